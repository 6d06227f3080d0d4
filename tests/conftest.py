"""让测试能导入 qwen_chinese_finetune 里的 qwen_common。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "qwen_chinese_finetune"))
