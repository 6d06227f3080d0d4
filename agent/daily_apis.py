"""evaluate_tools.py 的题要用的工具：七个小小的接口，火车票、外卖、家里的电器、日程、钱包、图书馆、小工具箱。

每个接口是一个类，公开的方法就是工具（schema 由 function_schema 从签名与 docstring 里读出）；公开的属性就是状态，
程序做完几个调用，看状态与结果对不对（BFCL 第三版的做法）。没有网络，没有时钟：今天总是 2025-06-18，星期三。
"""

from __future__ import annotations

import datetime
import re
from typing import Literal, TypedDict

from function_schema import function_schema

TODAY = datetime.date(2025, 6, 18)
SYSTEM = "今天是 2025-06-18，星期三。"
RELATIVE = {"今天": 0, "今日": 0, "明天": 1, "明日": 1, "后天": 2, "大后天": 3}
WEEKDAYS = "一二三四五六日"
Date = str  # 日期写成 2025-06-19，也认 明天、6月19日、周五


class ToolError(Exception):
    """工具做不了：结果以"出错了："开头，状态不变。"""


# ---------------------------------------------------------------- 读参数：同一样东西的几种写法，在这里成一种


def day(text: str) -> str:
    """日期的几种写法 → 2025-06-19。"""
    text = text.strip()
    if text in RELATIVE:
        return (TODAY + datetime.timedelta(RELATIVE[text])).isoformat()
    if found := re.fullmatch(r"(本|这|下)?(?:周|星期|礼拜)([一二三四五六日天])", text):
        weekday = WEEKDAYS.index(found[2].replace("天", "日"))
        monday = TODAY - datetime.timedelta(TODAY.weekday() - (7 if found[1] == "下" else 0))
        return (monday + datetime.timedelta(weekday)).isoformat()
    found = re.fullmatch(r"(?:(\d{4})[-/.年])?(\d{1,2})[-/.月](\d{1,2})[日号]?", text)
    try:
        return datetime.date(int(found[1] or TODAY.year), int(found[2]), int(found[3])).isoformat()
    except (TypeError, ValueError):
        raise ToolError(f"看不懂日期 {text}，要写成 2025-06-19") from None


def clock(text: str) -> str:
    """时刻的几种写法 → 15:00。"""
    found = re.fullmatch(r"(上午|下午|晚上)?(\d{1,2})(?:[:：点](半|\d{1,2})?分?)?", text.strip())
    if not found:
        raise ToolError(f"看不懂时刻 {text}，要写成 15:00")
    hour, minute = int(found[2]), 30 if found[3] == "半" else int(found[3] or 0)
    hour += 12 if found[1] in ("下午", "晚上") and hour < 12 else 0
    if hour > 23 or minute > 59:
        raise ToolError(f"没有 {text} 这个时刻")
    return f"{hour:02}:{minute:02}"


def place(text: str) -> str:
    """北京市、北京站、北京 是同一个地方。"""
    return re.sub(r"[市站]$", "", text.strip())


def title(text: str) -> str:
    return text.strip().strip("《》“”\"'「」 ")


def positive(number: float, what: str) -> float:
    if isinstance(number, bool) or number <= 0:
        raise ToolError(f"{what}要大于 0，给的是 {number}")
    return number


# ---------------------------------------------------------------- 火车票

TRAINS = {
    "G1": ("北京", "上海", "09:00", 553),
    "G7": ("北京", "上海", "10:00", 598),
    "G2": ("上海", "北京", "09:00", 553),
    "G79": ("北京", "广州", "10:00", 862),
    "D301": ("北京", "上海", "19:36", 309),
    "G1521": ("杭州", "南京", "08:15", 117),
    "G1376": ("上海", "杭州", "14:20", 73),
    "C2001": ("北京", "天津", "06:32", 54),
}
Seat = Literal["二等座", "一等座", "商务座"]


class Railway:
    def __init__(self) -> None:
        self.orders: dict[str, dict] = {}
        self.next_order = 1001

    def query_trains(self, from_city: str, to_city: str, date: str, after: str = "00:00") -> list:
        """查两个城市之间某一天有哪些车次、几点开、多少钱，只查不买。

        参数：
            from_city: 出发城市
            to_city: 到达城市
            date: 出发日期，如 2025-06-19
            after: 只要几点以后开的，如 12:00
        """
        day(date)
        here, there, start = place(from_city), place(to_city), clock(after)
        return [
            {"train_no": number, "start": leaves, "price": price}
            for number, (a, b, leaves, price) in TRAINS.items()
            if (a, b) == (here, there) and leaves >= start
        ]

    def book_ticket(self, train_no: str, date: str, passenger: str, seat: Seat = "二等座") -> dict:
        """买一张火车票，返回订单号。

        参数：
            train_no: 车次，如 G1
            date: 出发日期，如 2025-06-19
            passenger: 乘车人的姓名
            seat: 席别
        """
        number = train_no.strip().upper()
        if number not in TRAINS:
            raise ToolError(f"没有车次 {train_no}")
        order, self.next_order = f"T{self.next_order}", self.next_order + 1
        self.orders[order] = {"train_no": number, "date": day(date), "passenger": passenger, "seat": seat}
        return {"order": order, "price": TRAINS[number][3] * {"二等座": 1, "一等座": 2, "商务座": 3}[seat]}

    def change_ticket(self, order: str, date: str) -> dict:
        """把已经买的票改签到另一天，车次不变。

        参数：
            order: 订单号，如 T1001
            date: 新的出发日期
        """
        self._find(order)["date"] = day(date)
        return {"order": order} | self.orders[order]

    def refund_ticket(self, order: str) -> str:
        """退掉已经买的票。

        参数：
            order: 订单号，如 T1001
        """
        self._find(order)
        del self.orders[order]
        return f"{order} 已退票"

    def list_orders(self) -> dict:
        """看已经买了哪些火车票。"""
        return self.orders

    def _find(self, order: str) -> dict:
        if order not in self.orders:
            raise ToolError(f"没有订单 {order}")
        return self.orders[order]


# ---------------------------------------------------------------- 外卖

SHOPS = {
    "老王面馆": {"minutes": 25, "menu": {"牛肉面": 28, "炸酱面": 22, "凉拌黄瓜": 12}},
    "川香阁": {"minutes": 40, "menu": {"宫保鸡丁": 38, "麻婆豆腐": 26, "米饭": 3}},
    "甜品站": {"minutes": 30, "menu": {"双皮奶": 18, "杨枝甘露": 24, "红豆沙": 15}},
    "小张饺子": {"minutes": 20, "menu": {"韭菜饺子": 24, "三鲜饺子": 28, "酸辣汤": 16}},
}


class Takeaway:
    def __init__(self) -> None:
        self.cart: dict[str, int] = {}
        self.orders: list[dict] = []

    def search_shops(self, keyword: str, max_minutes: int = 60) -> list:
        """按店名或菜名找外卖店。

        参数：
            keyword: 店名或菜名里的词
            max_minutes: 最多等几分钟
        """
        word = keyword.strip()
        return [
            {"shop": name, "minutes": shop["minutes"]}
            for name, shop in SHOPS.items()
            if shop["minutes"] <= max_minutes and (word in name or any(word in dish for dish in shop["menu"]))
        ]

    def show_menu(self, shop: str) -> dict:
        """看一家店的菜单与价钱。

        参数：
            shop: 店名
        """
        if shop not in SHOPS:
            raise ToolError(f"没有 {shop} 这家店")
        return SHOPS[shop]["menu"]

    def add_to_cart(self, dish: str, count: int = 1) -> dict:
        """把一道菜放进购物车，还没有下单。

        参数：
            dish: 菜名
            count: 几份
        """
        self._price(dish)
        self.cart[dish] = self.cart.get(dish, 0) + int(positive(count, "份数"))
        return self.cart

    def remove_from_cart(self, dish: str) -> dict:
        """把一道菜从购物车里拿掉。

        参数：
            dish: 菜名
        """
        if dish not in self.cart:
            raise ToolError(f"购物车里没有 {dish}")
        del self.cart[dish]
        return self.cart

    def place_order(self, address: str, note: str = "") -> dict:
        """把购物车里的菜下单，送到一个地址。

        参数：
            address: 送到哪里
            note: 给店家的备注
        """
        if not self.cart:
            raise ToolError("购物车是空的")
        total = sum(self._price(dish) * count for dish, count in self.cart.items())
        self.orders.append({"dishes": self.cart, "address": address, "note": note, "total": total})
        self.cart = {}
        return {"number": len(self.orders), "total": total}

    def _price(self, dish: str) -> int:
        for shop in SHOPS.values():
            if dish in shop["menu"]:
                return shop["menu"][dish]
        raise ToolError(f"哪家店都没有 {dish}")


# ---------------------------------------------------------------- 家里的电器

ROOMS = ("客厅", "卧室", "书房", "厨房")
Room = Literal["客厅", "卧室", "书房", "厨房"]


class Home:
    def __init__(self) -> None:
        self.lights = {room: {"on": False, "brightness": 100} for room in ROOMS}
        self.air = {room: {"on": False, "temperature": 26.0, "mode": "制冷"} for room in ROOMS}
        self.curtains = dict.fromkeys(ROOMS, 100)
        self.cleaning: list[str] = []

    def set_light(self, room: Room, on: bool, brightness: int = 100) -> dict:
        """开灯、关灯，调亮度。

        参数：
            room: 哪个房间
            on: true 是开，false 是关
            brightness: 亮度，1 到 100
        """
        self.lights[room] = {"on": on, "brightness": brightness}
        return self.lights[room]

    def set_air_conditioner(
        self, room: Room, on: bool, temperature: float = 26.0, mode: Literal["制冷", "制热", "除湿"] = "制冷"
    ) -> dict:
        """开关空调，设定温度与模式。

        参数：
            room: 哪个房间
            on: true 是开，false 是关
            temperature: 几度，16 到 30
            mode: 模式
        """
        if not 16 <= temperature <= 30:
            raise ToolError(f"温度要在 16 到 30 之间，给的是 {temperature}")
        self.air[room] = {"on": on, "temperature": float(temperature), "mode": mode}
        return self.air[room]

    def set_curtain(self, room: Room, percent: int) -> str:
        """把窗帘拉到某个位置。

        参数：
            room: 哪个房间
            percent: 拉开百分之几，0 是全部合上，100 是全部拉开
        """
        self.curtains[room] = percent
        return f"{room}的窗帘拉开了 {percent}%"

    def clean_rooms(self, rooms: list[str], mop: bool = False) -> list:
        """叫扫地机器人打扫几个房间，照给的次序。

        参数：
            rooms: 哪几个房间
            mop: 要不要也拖地
        """
        if unknown := [room for room in rooms if room not in ROOMS]:
            raise ToolError(f"没有 {'、'.join(unknown)} 这个房间")
        self.cleaning = [f"{room}{'扫拖' if mop else '扫'}" for room in rooms]
        return self.cleaning

    def read_temperature(self, room: Room) -> float:
        """看一个房间现在几度，只看不调。

        参数：
            room: 哪个房间
        """
        return {"客厅": 28.5, "卧室": 27.0, "书房": 29.0, "厨房": 31.5}[room]


# ---------------------------------------------------------------- 日程


class Calendar:
    def __init__(self) -> None:
        self.events = [
            {
                "title": "周会",
                "date": "2025-06-19",
                "start": "10:00",
                "minutes": 60,
                "people": ["王芳", "李强"],
            },
            {"title": "看牙", "date": "2025-06-20", "start": "15:30", "minutes": 30, "people": []},
        ]
        self.reminders: list[dict] = []

    def add_event(
        self, title: str, date: str, start: str, minutes: int = 60, people: list[str] | None = None
    ) -> dict:
        """在日程里加一件占时间的事（会议、约会），可以邀请人。

        参数：
            title: 什么事
            date: 哪一天，如 2025-06-19
            start: 几点开始，如 15:00
            minutes: 多少分钟
            people: 邀请哪几个人
        """
        event = {"title": title, "date": day(date), "start": clock(start)}
        self.events.append(event | {"minutes": int(positive(minutes, "时长")), "people": people or []})
        return self.events[-1]

    def cancel_event(self, title: str, date: str) -> str:
        """取消日程里的一件事。

        参数：
            title: 什么事
            date: 哪一天
        """
        self.events.remove(self._find(title, date))
        return f"取消了 {title}"

    def move_event(self, title: str, date: str, new_date: str, new_start: str) -> dict:
        """把日程里的一件事改到另一个时间。

        参数：
            title: 什么事
            date: 原来在哪一天
            new_date: 改到哪一天
            new_start: 改到几点
        """
        event = self._find(title, date)
        event |= {"date": day(new_date), "start": clock(new_start)}
        return event

    def list_events(self, date: str) -> list:
        """看某一天有什么事。

        参数：
            date: 哪一天，如 2025-06-19
        """
        return [event for event in self.events if event["date"] == day(date)]

    def set_reminder(self, text: str, date: str, time: str) -> dict:
        """到时候提醒一句话，不占日程。

        参数：
            text: 提醒什么
            date: 哪一天
            time: 几点
        """
        self.reminders.append({"text": text, "date": day(date), "time": clock(time)})
        return self.reminders[-1]

    def _find(self, name: str, date: str) -> dict:
        for event in self.events:
            if event["title"] == name and event["date"] == day(date):
                return event
        raise ToolError(f"{day(date)} 没有 {name}")


# ---------------------------------------------------------------- 钱包

RATES = {"人民币": 1.0, "美元": 7.2, "欧元": 8.3, "日元": 0.05}  # 一个单位值多少人民币
Currency = Literal["人民币", "美元", "欧元", "日元"]


class Item(TypedDict):
    name: str
    price: float


class Wallet:
    def __init__(self) -> None:
        self.balance = {"活期": 5000.0, "余额宝": 12000.0}
        self.records: list[dict] = []

    def get_balance(self, account: Literal["活期", "余额宝"] = "活期") -> float:
        """查一个账户还有多少钱。

        参数：
            account: 哪个账户
        """
        return self.balance[account]

    def transfer(self, to: str, amount: float, note: str = "") -> dict:
        """从活期转账给一个人。

        参数：
            to: 收款人
            amount: 多少元
            note: 附言
        """
        return self._pay({"kind": "转账", "to": to, "note": note}, amount)

    def pay_bill(self, kind: Literal["水费", "电费", "燃气费", "话费"], amount: float) -> dict:
        """从活期缴生活费用。

        参数：
            kind: 缴什么费
            amount: 多少元
        """
        return self._pay({"kind": kind}, amount)

    def convert_currency(self, amount: float, from_currency: Currency, to_currency: Currency) -> float:
        """算一笔钱换成另一种货币是多少，只算不换。

        参数：
            amount: 多少
            from_currency: 原来的货币
            to_currency: 换成的货币
        """
        return round(amount * RATES[from_currency] / RATES[to_currency], 2)

    def split_bill(self, items: list[Item], people: int) -> float:
        """几样东西的账几个人平分，每人多少元，只算不付。

        参数：
            items: 各样东西与价钱
            people: 几个人
        """
        return round(sum(item["price"] for item in items) / positive(people, "人数"), 2)

    def _pay(self, record: dict, amount: float) -> dict:
        if positive(amount, "金额") > self.balance["活期"]:
            raise ToolError(f"活期只有 {self.balance['活期']} 元，不够 {amount} 元")
        self.balance["活期"] -= amount
        self.records.append(record | {"amount": float(amount)})
        return {"paid": float(amount), "left": self.balance["活期"]}


# ---------------------------------------------------------------- 图书馆

BOOKS = {
    "三国演义": "罗贯中",
    "红楼梦": "曹雪芹",
    "西游记": "吴承恩",
    "朝花夕拾": "鲁迅",
    "呐喊": "鲁迅",
    "围城": "钱钟书",
    "活着": "余华",
}


class Library:
    def __init__(self) -> None:
        self.borrowed = {"围城": "2025-06-25"}
        self.rooms: list[dict] = []

    def search_books(self, keyword: str, by: Literal["书名", "作者"] = "书名") -> list:
        """在图书馆里找书。

        参数：
            keyword: 书名或作者里的词
            by: 按什么找
        """
        word = title(keyword)
        return [book for book, author in BOOKS.items() if word in (book if by == "书名" else author)]

    def borrow_book(self, book: str, days: int = 30) -> dict:
        """借一本书。

        参数：
            book: 书名
            days: 借几天
        """
        book = title(book)
        if book not in BOOKS or book in self.borrowed:
            raise ToolError(f"{book} 借不到")
        due = TODAY + datetime.timedelta(int(positive(days, "天数")))
        self.borrowed[book] = due.isoformat()
        return {"book": book, "due": self.borrowed[book]}

    def renew_book(self, book: str, days: int = 14) -> dict:
        """把已经借的书再借几天。

        参数：
            book: 书名
            days: 再借几天
        """
        book = self._mine(book)
        due = datetime.date.fromisoformat(self.borrowed[book]) + datetime.timedelta(days)
        self.borrowed[book] = due.isoformat()
        return {"book": book, "due": self.borrowed[book]}

    def return_book(self, book: str) -> str:
        """还一本书。

        参数：
            book: 书名
        """
        book = self._mine(book)
        del self.borrowed[book]
        return f"还了《{book}》"

    def reserve_room(
        self, date: str, start: str, people: int, equipment: dict[str, int] | None = None
    ) -> dict:
        """订一间讨论室。

        参数：
            date: 哪一天
            start: 几点开始
            people: 几个人
            equipment: 要的设备与件数，如 {"投影仪": 1}
        """
        counts = {name: int(count) for name, count in (equipment or {}).items()}
        room = {"date": day(date), "start": clock(start), "people": people, "equipment": counts}
        self.rooms.append(room)
        return {"room": f"讨论室{len(self.rooms)}"} | room

    def _mine(self, book: str) -> str:
        if title(book) not in self.borrowed:
            raise ToolError(f"没有借《{title(book)}》")
        return title(book)


# ---------------------------------------------------------------- 小工具箱

WEATHER = {
    "北京": ("晴", 31, 85),
    "上海": ("小雨", 26, 40),
    "广州": ("雷阵雨", 30, 35),
    "成都": ("阴", 25, 70),
}
UNITS = {
    "千米": 1000.0, "公里": 1000.0, "米": 1.0, "厘米": 0.01, "里": 500.0,
    "千克": 1000.0, "公斤": 1000.0, "斤": 500.0, "克": 1.0, "两": 50.0,
    "小时": 60.0, "分钟": 1.0, "天": 1440.0,
}  # fmt: skip
DIMENSIONS = (
    {"千米", "公里", "米", "厘米", "里"},
    {"千克", "公斤", "斤", "克", "两"},
    {"小时", "分钟", "天"},
)


class Toolbox:
    def get_weather(self, city: str, date: str = "今天") -> dict:
        """查一个城市某一天的天气与最高气温。

        参数：
            city: 哪座城市
            date: 哪一天，如 2025-06-19
        """
        sky, degrees, _ = self._city(city)
        later = (datetime.date.fromisoformat(day(date)) - TODAY).days
        return {"city": place(city), "date": day(date), "weather": sky, "high": degrees - later}

    def get_air_quality(self, city: str) -> int:
        """查一个城市现在的空气质量指数。

        参数：
            city: 哪座城市
        """
        return self._city(city)[2]

    def calculator(self, expression: str) -> float:
        """算一个算式，可以有加减乘除与括号。

        参数：
            expression: 算式，如 (12+3)*4
        """
        return calculate(expression)

    def convert_unit(self, value: float, from_unit: str, to_unit: str) -> float:
        """换算长度、重量、时间的单位。

        参数：
            value: 多少
            from_unit: 原来的单位，如 斤
            to_unit: 换成的单位，如 克
        """
        if not any({from_unit, to_unit} <= units for units in DIMENSIONS):
            raise ToolError(f"{from_unit} 换不成 {to_unit}")
        return round(value * UNITS[from_unit] / UNITS[to_unit], 6)

    def days_between(self, first: str, second: str) -> int:
        """两个日期之间隔几天。

        参数：
            first: 前一个日期
            second: 后一个日期
        """
        dates = [datetime.date.fromisoformat(day(text)) for text in (first, second)]
        return (dates[1] - dates[0]).days

    def _city(self, city: str) -> tuple[str, int, int]:
        if place(city) not in WEATHER:
            raise ToolError(f"没有 {city} 的数据")
        return WEATHER[place(city)]


def calculate(expression: str) -> float:
    """加减乘除与括号，一层一层地算；不用 eval。"""
    text = expression.replace("×", "*").replace("÷", "/").replace("（", "(").replace("）", ")")
    tokens = re.findall(r"\d+(?:\.\d+)?|[-+*/()]", text)
    if "".join(tokens) != re.sub(r"\s", "", text) or not tokens or len(tokens) > 200:
        raise ToolError(f"算不了 {expression[:40]}")
    try:
        value = _sum(tokens)
    except (IndexError, ValueError, ZeroDivisionError):
        raise ToolError(f"算不了 {expression[:40]}") from None
    if tokens:
        raise ToolError(f"算不了 {expression[:40]}")
    return round(value, 6)


def _sum(tokens: list[str]) -> float:
    value = _product(tokens)
    while tokens and tokens[0] in "+-":
        value += _product(tokens) if tokens.pop(0) == "+" else -_product(tokens)
    return value


def _product(tokens: list[str]) -> float:
    value = _factor(tokens)
    while tokens and tokens[0] in "*/":
        value = value * _factor(tokens) if tokens.pop(0) == "*" else value / _factor(tokens)
    return value


def _factor(tokens: list[str]) -> float:
    token = tokens.pop(0)
    if token == "-":
        return -_factor(tokens)
    if token == "(":
        value = _sum(tokens)
        if tokens.pop(0) != ")":
            raise ValueError
        return value
    return float(token)


# ---------------------------------------------------------------- 全部的工具

APIS = {api.__name__: api for api in (Railway, Takeaway, Home, Calendar, Wallet, Library, Toolbox)}


def methods_of(api: object) -> dict:
    """一个接口的工具：名字 → 方法。"""
    names = [name for name in dir(api) if not name.startswith("_") and callable(getattr(api, name))]
    return {name: getattr(api, name) for name in names}


def fresh_world(names: list[str] | None = None) -> dict[str, object]:
    """几个接口，都在最初的状态；names 是 None 就是全部。"""
    return {name: APIS[name]() for name in names or APIS}


def all_tools() -> dict[str, dict]:
    """工具的名字 → 它的说明（OpenAI 的写法）。"""
    world = fresh_world()
    return {
        name: function_schema(method) for api in world.values() for name, method in methods_of(api).items()
    }
