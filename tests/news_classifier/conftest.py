"""让测试能导入 news_classifier 里的文件。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "news_classifier"))
