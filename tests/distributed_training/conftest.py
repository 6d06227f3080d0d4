"""让测试（与它开的进程）能导入 distributed_training 里的脚本。"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "distributed_training"))
