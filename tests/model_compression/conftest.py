"""让测试能导入 model_compression 里的脚本。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "model_compression"))
sys.path.insert(0, str(Path(__file__).resolve().parent))  # 测试自己的帮手
