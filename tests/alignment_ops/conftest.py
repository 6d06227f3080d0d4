"""让测试能导入 alignment_ops 里的脚本。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "alignment_ops"))
