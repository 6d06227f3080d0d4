"""测试用的 hub：nlp_common/hub/local_hub.py 里的那一个（没有网的读者也用它演习）。"""

from nlp_common.hub.local_hub import LocalHub as FakeHub

__all__ = ["FakeHub"]
