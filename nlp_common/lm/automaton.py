"""文法的树 → 下推自动机：状态是一组栈，读一个字节换一个状态。text_generation/constrained_decoding.py 与 agent/tool_schema.py 的约束解码都用它。

算过的换法都记下来，同样的状态只算一次；没有递归的文法，用着用着就成了一张有限的表。
"""

from dataclasses import dataclass

import numpy as np

from nlp_common.base.errors import UserError

MAX_STATES = 20000
DEAD = 0  # 走不通的状态


@dataclass(frozen=True, eq=False)
class Frame:
    """栈的一层：还没写的节点，和它下面的一层；need 是从这里到写完最少还要几个字节。"""

    node: tuple
    below: "Frame | None"
    need: int


class Matcher:
    """状态是整数：DEAD 走不通，start 是开头。step 读一个字节；can_end 说写到这里算不算完整。"""

    def __init__(self, rules: dict[str, tuple]):
        self.rules = rules
        self._check_names()
        self.least = self._least_bytes()  # 每条规则最少几个字节
        if self.least["root"] is None:
            raise UserError("这部文法写不出任何一句话：root 总也写不完（规则只会不停地套自己）。")
        self._check_left_recursion()
        self._frames: dict[tuple, Frame] = {}
        self._fewer_of: dict[int, tuple] = {}
        self._numbers: dict[frozenset, int] = {}
        self.states: list[frozenset] = []  # 状态 → 一组栈顶；None 是空栈，也就是写完了
        self.table: list[np.ndarray | None] = []  # 状态 → 读每个字节之后的状态 (256,)，用到才算
        self._number(frozenset())  # 0 号：DEAD
        root = self._push(("rule", "root"), None)
        self.start = self._number(self._expand([root]))

    # 一个状态能做什么
    def can_end(self, state: int) -> bool:
        return None in self.states[state]

    def need(self, state: int) -> int:
        """写完最少还要几个字节。"""
        return min((0 if frame is None else frame.need for frame in self.states[state]), default=10**9)

    def row(self, state: int) -> np.ndarray:
        """读每个字节之后的状态，(256,)。"""
        if (row := self.table[state]) is None:
            targets: dict[int, list] = {}
            for frame in self.states[state]:
                if frame is not None:
                    for byte in frame.node[1]:
                        targets.setdefault(byte, []).append(frame.below)
            row = np.zeros(256, dtype=np.int32)
            known: dict[tuple, int] = {}
            for byte, below in targets.items():
                key = tuple(sorted(map(id, below)))
                if key not in known:
                    known[key] = self._number(self._expand(below))
                row[byte] = known[key]
            self.table[state] = row
        return row

    def step(self, state: int, data: bytes) -> int:
        for byte in data:
            state = int(self.row(state)[byte])
        return state

    def matches(self, text: str) -> bool:
        """整段文字合不合文法。"""
        return self.can_end(self.step(self.start, text.encode()))

    # 栈
    def _push(self, node: tuple, below: Frame | None) -> Frame:
        key = (id(node), id(below))
        if key not in self._frames:
            need = (self._node_least(node, self.least) or 0) + (below.need if below else 0)
            self._frames[key] = Frame(node, below, need)
        return self._frames[key]

    def _expand(self, frames: list) -> frozenset:
        """把栈顶的规则、任选、重复都展开，直到栈顶都是一个字节，或者栈空了。"""
        found, waiting, seen = set(), list(frames), set()
        while waiting:
            frame = waiting.pop()
            if id(frame) in seen:
                continue
            seen.add(id(frame))
            if frame is None or frame.node[0] == "bytes":
                found.add(frame)
                continue
            kind, body, below = frame.node[0], frame.node[1], frame.below
            if kind == "rule":
                waiting.append(self._push(self.rules[body], below))
            elif kind == "alt":
                waiting += [self._push(option, below) for option in body]
            elif kind == "seq":
                for part in reversed(body):
                    below = self._push(part, below)
                waiting.append(below)
            else:
                waiting += self._repeat(frame.node, below)
        return frozenset(found)

    def _repeat(self, node: tuple, below: Frame | None) -> list:
        """x{少,多}：不再要了，或者先写一个 x，剩下的少一个。"""
        _, body, low, high = node
        options = [below] if low == 0 else []
        if high is None or high > 0:
            rest = self._fewer(node) if (low, high) != (0, None) else node
            options.append(self._push(body, self._push(rest, below)))
        return options

    def _fewer(self, node: tuple) -> tuple:
        """同样的重复，还要写的次数少一次；每个节点只造一个，栈的一层才认得出是同一层。"""
        if id(node) not in self._fewer_of:
            _, body, low, high = node
            self._fewer_of[id(node)] = ("repeat", body, max(0, low - 1), None if high is None else high - 1)
        return self._fewer_of[id(node)]

    def _number(self, frames: frozenset) -> int:
        if frames not in self._numbers:
            if len(self.states) >= MAX_STATES:
                raise UserError(
                    f"文法太复杂：状态超过 {MAX_STATES} 个。把重复的上限改小，或把有歧义的规则改写。"
                )
            self._numbers[frames] = len(self.states)
            self.states.append(frames)
            self.table.append(None)
        return self._numbers[frames]

    # 文法本身对不对
    def _check_names(self) -> None:
        def walk(node: tuple, inside: str) -> None:
            if node[0] == "rule" and node[1] not in self.rules:
                raise UserError(f"文法的规则 {inside} 用到了 {node[1]}，却没有定义它。")
            for child in node[1] if node[0] in ("seq", "alt") else [node[1]] if node[0] == "repeat" else []:
                walk(child, inside)

        for name, node in self.rules.items():
            walk(node, name)

    def _node_least(self, node: tuple, least: dict) -> int | None:
        """一个节点最少几个字节；还不知道（写不完）是 None。"""
        kind, body = node[0], node[1]
        if kind == "bytes":
            return 1 if body else None
        if kind == "rule":
            return least[body]
        if kind == "repeat":
            one = self._node_least(body, least) if node[2] else 0
            return None if one is None else one * node[2]
        parts = [self._node_least(part, least) for part in body]
        if kind == "seq":
            known = [part for part in parts if part is not None]
            return sum(known) if len(known) == len(parts) else None
        return min((part for part in parts if part is not None), default=None)

    def _least_bytes(self) -> dict[str, int | None]:
        least: dict[str, int | None] = dict.fromkeys(self.rules)
        while True:  # 从"都不知道"开始，一轮一轮地放宽，直到不再变
            new = {name: self._node_least(node, least) for name, node in self.rules.items()}
            if new == least:
                break
            least = new
        for name, value in least.items():
            if value is None and name != "root":
                raise UserError(
                    f"文法的规则 {name} 总也写不完：它的每一种写法都要再套自己。给它一种不套自己的写法。"
                )
        return least

    def _check_left_recursion(self) -> None:
        """a ::= a "x" 这样不读一个字就又回到自己的规则，会无穷地展开。"""
        heads = {name: self._heads(node) for name, node in self.rules.items()}
        for name in self.rules:
            seen, waiting = set(), list(heads[name])
            while waiting:
                other = waiting.pop()
                if other == name:
                    raise UserError(
                        f'文法的规则 {name} 左递归（一个字还没写又回到自己）：请改写，例如 a ::= a "x" | "y" 写成 a ::= "y" "x"*。'
                    )
                if other not in seen:
                    seen.add(other)
                    waiting += heads[other]

    def _heads(self, node: tuple) -> set[str]:
        """不读一个字节就可能走到的规则。"""
        kind, body = node[0], node[1]
        if kind == "rule":
            return {body}
        if kind == "repeat":
            return self._heads(body)
        if kind == "alt":
            return set().union(*map(self._heads, body))
        found: set[str] = set()
        if kind == "seq":
            for part in body:
                found |= self._heads(part)
                if self._node_least(part, self.least) != 0:
                    break
        return found
