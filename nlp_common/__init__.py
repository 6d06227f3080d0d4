"""各个主题共用的部分，分成八间屋子，导入只许由上往下：

    base              命令行、参数、设备、进程、运行记录
    fast   draw       只为快；画图
    hub    lm         模型从哪里来；语言模型
    data   tiny       读数据；小世界
    train             训练循环、阶段的外壳

任何主题的脚本都可以导入它，它不导入任何脚本。导入它就设好环境变量：Hugging Face 的库一导入就读它们，
所以脚本把 ``from nlp_common…`` 写在最前面。
"""

from .base.environment import prepare_environment
from .fast.memory import keep_freed_memory

prepare_environment()
keep_freed_memory()
