"""内置的写函数的题，自己出的：题面是 HumanEval 的样子（函数头与中文说明），测试里有边界；wrong 是常见的错法，给模拟的程序员用。

一道题是 {"task_id", "prompt", "entry_point", "canonical_solution", "test", "wrong"}，除了 wrong 与 HumanEval 的 jsonl 相同：
prompt + canonical_solution 是一份对的答案，test 里定义 check(candidate)。
"""

from __future__ import annotations

import textwrap


def build(head: str, doc: str, body: str, checks: str, wrong: list[str], before: str = "") -> dict:
    """一道题。head 是函数头，doc 是说明，body 与 wrong 是函数体，checks 是一行行的断言（函数叫 f）。"""
    name = head.partition("(")[0]
    lines = textwrap.indent(textwrap.dedent(doc).strip(), "    ")
    prompt = f'{before}def {head}:\n    """{lines.strip()}\n    """\n'
    return {
        "task_id": f"NLP/{name}",
        "prompt": prompt,
        "entry_point": name,
        "canonical_solution": indent(body),
        "test": "def check(f):\n" + indent(checks),
        "wrong": [indent(each) for each in wrong],
    }


def indent(text: str) -> str:
    return textwrap.indent(textwrap.dedent(text).strip("\n"), "    ") + "\n"


TASKS = [
    build(
        "count_hanzi(text)",
        """
        数一段文字里有几个汉字（U+4E00 到 U+9FFF），标点、字母、数字不算。
        >>> count_hanzi("我有3个apple。")
        3
        """,
        'return sum("\\u4e00" <= c <= "\\u9fff" for c in text)',
        """
        assert f("我有3个apple。") == 3
        assert f("") == 0
        assert f("hello, world") == 0
        assert f("一龥，。！") == 2
        assert f("ひらがな漢字") == 2
        """,
        [
            "return len(text)",
            "return sum(ord(c) > 127 for c in text)",
            "return sum(c.isalpha() for c in text)",
        ],
    ),
    build(
        "full_to_half(text)",
        """
        全角的字母、数字、标点（U+FF01 到 U+FF5E）与全角空格换成半角的，别的不动。
        >>> full_to_half("ＡＢＣ　１２３！中文")
        'ABC 123!中文'
        """,
        """
        result = ""
        for c in text:
            if c == "\\u3000":
                result += " "
            elif "\\uff01" <= c <= "\\uff5e":
                result += chr(ord(c) - 0xFEE0)
            else:
                result += c
        return result
        """,
        """
        assert f("ＡＢＣ　１２３！中文") == "ABC 123!中文"
        assert f("") == ""
        assert f("abc，。") == "abc,。"
        assert f("～") == "~"
        """,
        [
            "return text",
            'return "".join(chr(ord(c) - 0xFEE0) if ord(c) > 0xFF00 else c for c in text)',
            'return text.replace("\\u3000", " ")',
        ],
    ),
    build(
        "to_chinese(n)",
        """
        0 到 99 的整数写成汉字。十几写成"十几"，不写"一十几"。
        >>> to_chinese(15), to_chinese(20), to_chinese(47)
        ('十五', '二十', '四十七')
        """,
        """
        digits = "零一二三四五六七八九"
        if n < 10:
            return digits[n]
        tens, ones = divmod(n, 10)
        return ("" if tens == 1 else digits[tens]) + "十" + (digits[ones] if ones else "")
        """,
        """
        assert f(0) == "零" and f(9) == "九"
        assert f(10) == "十" and f(15) == "十五"
        assert f(20) == "二十" and f(47) == "四十七" and f(99) == "九十九"
        """,
        [
            'return "".join("零一二三四五六七八九"[int(c)] for c in str(n))',
            'd = "零一二三四五六七八九"\nreturn d[n] if n < 10 else d[n // 10] + "十" + d[n % 10]',
        ],
    ),
    build(
        "from_chinese(text)",
        """
        汉字写的 0 到 99 变成整数，是"十五"这样的写法。
        >>> from_chinese("十五"), from_chinese("二十"), from_chinese("零")
        (15, 20, 0)
        """,
        """
        digits = {c: i for i, c in enumerate("零一二三四五六七八九")}
        if "十" not in text:
            return digits[text]
        tens, ones = text.split("十")
        return (digits[tens] if tens else 1) * 10 + (digits[ones] if ones else 0)
        """,
        """
        assert f("零") == 0 and f("七") == 7
        assert f("十") == 10 and f("十五") == 15
        assert f("二十") == 20 and f("九十九") == 99
        """,
        [
            'return "零一二三四五六七八九十".index(text[0])',
            'd = "零一二三四五六七八九"\na, _, b = text.partition("十")\nreturn d.index(a or "零") * 10 + d.index(b or "零")',
        ],
    ),
    build(
        "is_leap(year)",
        """
        公历的这一年是不是闰年：能被 4 整除而不能被 100 整除，或能被 400 整除。
        >>> is_leap(2000), is_leap(1900)
        (True, False)
        """,
        "return year % 4 == 0 and year % 100 != 0 or year % 400 == 0",
        """
        assert f(2024) is True and f(2023) is False
        assert f(2000) is True and f(1900) is False and f(2100) is False
        """,
        ["return year % 4 == 0", "return year % 4 == 0 and year % 100 != 0"],
    ),
    build(
        "zodiac(year)",
        """
        公历年份的生肖（不管春节的早晚），2020 年是鼠。
        >>> zodiac(2024)
        '龙'
        """,
        'return "鼠牛虎兔龙蛇马羊猴鸡狗猪"[(year - 2020) % 12]',
        """
        assert f(2020) == "鼠" and f(2024) == "龙" and f(2031) == "猪"
        assert f(2019) == "猪" and f(1949) == "牛" and f(2032) == "鼠"
        """,
        [
            'return "鼠牛虎兔龙蛇马羊猴鸡狗猪"[year % 12]',
            'return "鼠牛虎兔龙蛇马羊猴鸡狗猪"[(year - 2019) % 12]',
        ],
    ),
    build(
        "mask_phone(text)",
        """
        文字里的手机号（前后都不是数字的、1 开头的 11 位数字）中间四位换成 ****，别的数字不动。
        >>> mask_phone("打13812345678找我")
        '打138****5678找我'
        """,
        'return re.sub(r"(?<!\\d)(1\\d{2})\\d{4}(\\d{4})(?!\\d)", r"\\1****\\2", text)',
        """
        assert f("打13812345678找我") == "打138****5678找我"
        assert f("订单138123456789") == "订单138123456789"
        assert f("23812345678") == "23812345678"
        assert f("13812345678，15000001111") == "138****5678，150****1111"
        """,
        [
            'return re.sub(r"(\\d{3})\\d{4}(\\d{4})", r"\\1****\\2", text)',
            'return re.sub(r"1\\d{10}", "****", text)',
        ],
        before="import re\n\n\n",
    ),
    build(
        "common_prefix(words)",
        """
        几个词最长的共同开头；没有词是空字符串。
        >>> common_prefix(["中国人", "中国话", "中医"])
        '中'
        """,
        """
        if not words:
            return ""
        length = 0
        while all(len(word) > length and word[length] == words[0][length] for word in words):
            length += 1
        return words[0][:length]
        """,
        """
        assert f(["中国人", "中国话", "中医"]) == "中"
        assert f([]) == "" and f(["独"]) == "独" and f(["", "a"]) == ""
        assert f(["abc", "abc"]) == "abc" and f(["ab", "abc"]) == "ab" and f(["x", "y"]) == ""
        """,
        [
            'return words[0][:1] if words else ""',
            "length = 0\nwhile words and all(word[length] == words[0][length] for word in words):\n    length += 1\nreturn words[0][:length]",
        ],
    ),
    build(
        "top_words(text, k)",
        """
        空格隔开的词里最常见的 k 个，按次数从多到少；次数相同的按字典序。
        >>> top_words("b a b c a d", 2)
        ['a', 'b']
        """,
        """
        counts = {}
        for word in text.split():
            counts[word] = counts.get(word, 0) + 1
        return sorted(counts, key=lambda word: (-counts[word], word))[:k]
        """,
        """
        assert f("b a b c a d", 2) == ["a", "b"]
        assert f("", 3) == [] and f("x x y", 5) == ["x", "y"]
        assert f("z z y y y", 1) == ["y"] and f("z z y", 1) == ["z"]
        """,
        [
            "from collections import Counter\nreturn [word for word, _ in Counter(text.split()).most_common(k)]",
            "return sorted(set(text.split()))[:k]",
        ],
    ),
    build(
        "rotate(matrix)",
        """
        矩阵（行的列表）顺时针转 90 度，返回新的。
        >>> rotate([[1, 2], [3, 4], [5, 6]])
        [[5, 3, 1], [6, 4, 2]]
        """,
        "return [list(column) for column in zip(*matrix[::-1])]",
        """
        assert f([[1, 2], [3, 4], [5, 6]]) == [[5, 3, 1], [6, 4, 2]]
        assert f([[7]]) == [[7]] and f([]) == []
        assert f([[1, 2, 3]]) == [[1], [2], [3]]
        """,
        [
            "return [list(column) for column in zip(*matrix)]",
            "return [column for column in zip(*matrix[::-1])]",
        ],
    ),
    build(
        "merge(intervals)",
        """
        合并相交或相接的区间 [开始, 结束]，按开始排好。
        >>> merge([[5, 7], [1, 3], [2, 4]])
        [[1, 4], [5, 7]]
        """,
        """
        result = []
        for start, end in sorted(intervals):
            if result and start <= result[-1][1]:
                result[-1][1] = max(result[-1][1], end)
            else:
                result.append([start, end])
        return result
        """,
        """
        assert f([[5, 7], [1, 3], [2, 4]]) == [[1, 4], [5, 7]]
        assert f([]) == [] and f([[1, 2], [2, 3]]) == [[1, 3]]
        assert f([[1, 10], [2, 3]]) == [[1, 10]]
        """,
        [
            "result = []\nfor s, e in sorted(intervals):\n    if result and s <= result[-1][1]:\n        result[-1][1] = e\n"
            "    else:\n        result.append([s, e])\nreturn result",
            "return sorted(intervals)",
        ],
    ),
    build(
        "balanced(text)",
        """
        括号配不配得上：() （） 【】 《》 四种，别的字不管。
        >>> balanced("《三体（上）》"), balanced("（】")
        (True, False)
        """,
        """
        pairs = {")": "(", "）": "（", "】": "【", "》": "《"}
        waiting = []
        for c in text:
            if c in pairs.values():
                waiting.append(c)
            elif c in pairs:
                if not waiting or waiting.pop() != pairs[c]:
                    return False
        return not waiting
        """,
        """
        assert f("《三体（上）》") is True and f("（】") is False
        assert f("") is True and f("(") is False and f(")") is False
        assert f("（【）】") is False and f("(）") is False
        """,
        [
            'return all(text.count(a) == text.count(b) for a, b in ("()", "（）", "【】", "《》"))',
            'return text.count("（") == text.count("）")',
        ],
    ),
    build(
        "run_length(text)",
        """
        连着的相同的字写成字与个数，一个的不写个数。
        >>> run_length("哈哈哈好aab")
        '哈3好a2b'
        """,
        """
        result, i = "", 0
        while i < len(text):
            j = i
            while j < len(text) and text[j] == text[i]:
                j += 1
            result += text[i] + (str(j - i) if j - i > 1 else "")
            i = j
        return result
        """,
        """
        assert f("哈哈哈好aab") == "哈3好a2b"
        assert f("") == "" and f("a") == "a" and f("aa") == "a2" and f("aba") == "aba"
        assert f("x" * 12) == "x12"
        """,
        [
            'return "".join(c + str(text.count(c)) for c in dict.fromkeys(text))',
            'from itertools import groupby\nreturn "".join(c + str(len(list(g))) for c, g in groupby(text))',
        ],
    ),
    build(
        "search(numbers, target)",
        """
        排好的列表里 target 第一次出现的位置；没有是 -1。
        >>> search([1, 3, 3, 5], 3)
        1
        """,
        """
        low, high = 0, len(numbers)
        while low < high:
            middle = (low + high) // 2
            if numbers[middle] < target:
                low = middle + 1
            else:
                high = middle
        return low if low < len(numbers) and numbers[low] == target else -1
        """,
        """
        assert f([1, 3, 3, 5], 3) == 1 and f([1, 3, 3, 5], 5) == 3
        assert f([], 1) == -1 and f([1, 2], 0) == -1 and f([1, 2], 3) == -1
        assert f([2] * 9, 2) == 0
        """,
        [
            "import bisect\nreturn bisect.bisect_left(numbers, target)",
            "return numbers.index(target)",
            "low, high = 0, len(numbers)\nwhile low < high:\n    middle = (low + high) // 2\n"
            "    if numbers[middle] < target:\n        low = middle\n    else:\n        high = middle\nreturn low",
        ],
    ),
    build(
        "moving_average(numbers, size)",
        """
        每连着 size 个数的平均；数不够是空列表。
        >>> moving_average([1, 2, 3, 4], 2)
        [1.5, 2.5, 3.5]
        """,
        "return [sum(numbers[i : i + size]) / size for i in range(len(numbers) - size + 1)]",
        """
        assert f([1, 2, 3, 4], 2) == [1.5, 2.5, 3.5]
        assert f([], 1) == [] and f([1], 2) == [] and f([3, 5], 2) == [4.0]
        """,
        [
            "return [sum(numbers[i : i + size]) / size for i in range(len(numbers) - size)]",
            "return [sum(numbers[i : i + size]) / size for i in range(len(numbers))]",
        ],
    ),
    build(
        "edit_distance(a, b)",
        """
        从 a 改到 b 最少几步：插入、删去、换一个字各算一步。
        >>> edit_distance("自然语言", "自然言语")
        2
        """,
        """
        row = list(range(len(b) + 1))
        for i, x in enumerate(a, 1):
            above, row[0] = row[0], i
            for j, y in enumerate(b, 1):
                above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
        return row[-1]
        """,
        """
        assert f("自然语言", "自然言语") == 2
        assert f("", "") == 0 and f("", "abc") == 3 and f("abc", "") == 3
        assert f("kitten", "sitting") == 3 and f("a", "a") == 0 and f("abc", "bca") == 2
        """,
        [
            "return sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))",
            "return abs(len(a) - len(b))",
            "if not a or not b:\n    return len(a or b)\nreturn min(edit_distance(a[1:], b), edit_distance(a, b[1:])) + 1",
        ],
    ),
    build(
        "to_base(n, base)",
        """
        非负整数写成 base 进制（2 到 16）的字符串，字母小写。
        >>> to_base(255, 16), to_base(5, 2)
        ('ff', '101')
        """,
        """
        digits = ""
        while n >= base:
            n, rest = divmod(n, base)
            digits = "0123456789abcdef"[rest] + digits
        return "0123456789abcdef"[n] + digits
        """,
        """
        assert f(255, 16) == "ff" and f(5, 2) == "101"
        assert f(0, 2) == "0" and f(10, 10) == "10" and f(16, 16) == "10"
        """,
        [
            'digits = ""\nwhile n:\n    n, rest = divmod(n, base)\n    digits = "0123456789abcdef"[rest] + digits\nreturn digits',
            'digits = "0"\nwhile n:\n    n, rest = divmod(n, base)\n    digits += str(rest)\nreturn digits',
        ],
    ),
    build(
        "unique(items)",
        """
        去掉重复的，留第一次出现的，次序不变。
        >>> unique([3, 1, 3, 2, 1])
        [3, 1, 2]
        """,
        "return list(dict.fromkeys(items))",
        """
        assert f([3, 1, 3, 2, 1]) == [3, 1, 2]
        assert f([]) == [] and f(["b", "a", "b"]) == ["b", "a"]
        """,
        ["return sorted(set(items))", "return items[::-1]"],
    ),
    build(
        "second_largest(numbers)",
        """
        第二大的不同的数；没有是 None。
        >>> second_largest([5, 5, 3])
        3
        """,
        """
        different = sorted(set(numbers))
        return different[-2] if len(different) > 1 else None
        """,
        """
        assert f([5, 5, 3]) == 3 and f([1, 2, 3]) == 2
        assert f([]) is None and f([7, 7]) is None and f([-1, -2]) == -2
        """,
        ["return sorted(numbers)[-2]", "return sorted(numbers)[-2] if len(numbers) > 1 else None"],
    ),
    build(
        "sentences(text)",
        """
        按 。！？ 切成句子，标点留在句尾；连着的标点在同一句，最后没有标点的也是一句。
        >>> sentences("你好！！在吗？好")
        ['你好！！', '在吗？', '好']
        """,
        'return re.findall(r"[^。！？]*[。！？]+|[^。！？]+$", text)',
        """
        assert f("你好！！在吗？好") == ["你好！！", "在吗？", "好"]
        assert f("") == [] and f("没有标点") == ["没有标点"] and f("完。") == ["完。"]
        """,
        [
            'return [s for s in re.split(r"[。！？]", text) if s]',
            'return re.findall(r"[^。！？]*[。！？]", text)',
        ],
        before="import re\n\n\n",
    ),
    build(
        "ngrams(text, n)",
        """
        文字里连着的 n 个字，依次列出；不够 n 个是空列表。
        >>> ngrams("自然语言", 2)
        ['自然', '然语', '语言']
        """,
        "return [text[i : i + n] for i in range(len(text) - n + 1)]",
        """
        assert f("自然语言", 2) == ["自然", "然语", "语言"]
        assert f("", 1) == [] and f("ab", 3) == [] and f("ab", 2) == ["ab"]
        """,
        [
            "return [text[i : i + n] for i in range(len(text))]",
            "return [text[i : i + n] for i in range(0, len(text), n)]",
        ],
    ),
    build(
        "f1(right, found, wanted)",
        """
        找到 found 个，其中 right 个对，应有 wanted 个：F1，即精确率与召回率的调和平均。哪个分母是 0，那一项算 0。
        >>> f1(2, 4, 2)
        0.6666666666666666
        """,
        """
        precision = right / found if found else 0.0
        recall = right / wanted if wanted else 0.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
        """,
        """
        assert abs(f(2, 4, 2) - 2 / 3) < 1e-9 and f(3, 3, 3) == 1
        assert f(0, 0, 0) == 0 and f(0, 5, 5) == 0 and f(0, 0, 4) == 0
        """,
        [
            "precision, recall = right / found, right / wanted\nreturn 2 * precision * recall / (precision + recall)",
            "return (right / found + right / wanted) / 2 if found and wanted else 0.0",
        ],
    ),
    build(
        "softmax(numbers)",
        """
        softmax，数很大时也不溢出。
        >>> softmax([0, 0])
        [0.5, 0.5]
        """,
        """
        top = max(numbers)
        powers = [math.exp(x - top) for x in numbers]
        return [power / sum(powers) for power in powers]
        """,
        """
        assert f([0, 0]) == [0.5, 0.5] and f([3]) == [1.0]
        assert f([1000, 0])[0] == 1.0
        assert abs(sum(f([1, 2, 3])) - 1) < 1e-9 and f([1, 2])[1] > 0.7
        """,
        [
            "powers = [math.exp(x) for x in numbers]\nreturn [power / sum(powers) for power in powers]",
            "return [x / sum(numbers) for x in numbers]",
        ],
        before="import math\n\n\n",
    ),
    build(
        "move_zeros(numbers)",
        """
        就地把列表里的 0 都挪到最后，别的次序不变；不返回新的列表。
        >>> numbers = [0, 1, 0, 3]
        >>> move_zeros(numbers)
        >>> numbers
        [1, 3, 0, 0]
        """,
        """
        rest = [x for x in numbers if x != 0]
        numbers[:] = rest + [0] * (len(numbers) - len(rest))
        """,
        """
        numbers = [0, 1, 0, 3]
        assert f(numbers) is None and numbers == [1, 3, 0, 0]
        empty = []
        f(empty)
        assert empty == []
        """,
        [
            "return [x for x in numbers if x] + [x for x in numbers if not x]",
            "numbers.sort(reverse=True)",
        ],
    ),
    build(
        "check_digit(first17)",
        """
        身份证号前 17 位（字符串）的校验码：各位乘 7 9 10 5 8 4 2 1 6 3 7 9 10 5 8 4 2 相加，除以 11 的余数 0 到 10
        依次对应 1 0 X 9 8 7 6 5 4 3 2。
        >>> check_digit("11010519491231002")
        'X'
        """,
        """
        weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]
        return "10X98765432"[sum(int(c) * w for c, w in zip(first17, weights)) % 11]
        """,
        """
        assert f("11010519491231002") == "X"
        assert f("0" * 17) == "1" and f("1" * 17) == "0" and f("1" + "0" * 16) == "5"
        """,
        [
            "return str(sum(map(int, first17)) % 11)",
            "weights = [7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2]\n"
            "return str(sum(int(c) * w for c, w in zip(first17, weights)) % 11)",
        ],
    ),
]
