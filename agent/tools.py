"""工具箱（先有计算器与日期时间，别的随后）。"""

from nlp_common.base.cli import run_main

import datetime
from collections.abc import Callable
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from expressions import ExpressionError, evaluate, shown
from function_schema import function_schema
from tool_calls import Result, Tool, ToolError, run_call

__all__ = ["Result", "Tool", "run_call", "toolbox"]


def calculator(expression: str) -> str:
    """算一个算式，准确地算：+ - * / // % ** 和括号。

    参数：
        expression: 算式，如 (23+48)*2
    """
    try:
        return shown(evaluate(expression))
    except ExpressionError as error:
        raise ToolError(f"算不了：{error}") from None


def toolbox(settings: object = None, clock: Callable[[], datetime.datetime] | None = None) -> dict[str, Tool]:
    return {"calculator": Tool("calculator", function_schema(calculator), calculator)}


def main(argv: list[str] | None = None) -> None:
    print(run_call, ZoneInfo, ZoneInfoNotFoundError)


if __name__ == "__main__":
    run_main(main)
