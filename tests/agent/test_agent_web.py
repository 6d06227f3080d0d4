"""网页：许可只认那一次的按钮；停下；窗口之间不串；写的都是文字；在真的浏览器里走一遍（没有就跳过）。"""

import shutil
import threading
import time

import pytest
from scripted import Script, call, tool

import agent_web as aw
from agent_run import Agent
from agent_secrets import Hider
from agent_web import Visitor, trace_frame
from nlp_common.base import web_page
from nlp_common.base.errors import UserError
from nlp_common.lm.reply_parser import Call

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = "<script>alert(1)</script>![x](http://evil.example/a.png)<img src=http://evil.example/b>"


@pytest.fixture(autouse=True)
def patient(monkeypatch):
    monkeypatch.setattr(aw, "EVERY", 0.01)
    monkeypatch.setattr(aw, "TOO_SOON", 0.0)
    monkeypatch.setattr(aw, "PATIENCE", 20.0)


@pytest.fixture
def deleted():
    return []


@pytest.fixture
def tools(deleted):
    look = tool("look", lambda who: f"{who}去了学校。{EVIL}", "who")
    return look | tool("delete", lambda path: deleted.append(path) or "删了", "path", writes=True)


LINES = [
    "<think>\n先查\n</think>\n\n我查。\n" + call("look", who="小梅"),
    call("delete", path="/a"),
    f"好了{EVIL}",
]


def run_through(visitor, question, act=None):
    """问一句，每一眼都看看要不要做什么；返回看到过的问许可。"""
    asked = []
    for _ in visitor.answer(question):
        if visitor.asking and visitor.asking.number not in [each.number for each in asked]:
            asked.append(visitor.asking)
        if act:
            act(visitor)
    return asked


@pytest.mark.parametrize(("allowed", "done"), [(True, ["/a"]), (False, [])])
def test_the_button_decides(tools, deleted, allowed, done):
    visitor = Visitor(Agent(Script(*LINES), tools), False)

    def press(each):
        if each.asking:
            each.decide(each.asking.number, allowed)

    (asked,) = run_through(visitor, "小梅去了哪里？", press)
    assert deleted == done and asked.text == 'delete {"path": "/a"}'
    titles = [each["metadata"]["title"] for each in visitor.shown if "metadata" in each]
    assert [title.split("（")[0] for title in titles] == ["思考", "→ look", "→ delete"]
    assert all(each["metadata"]["status"] == "done" for each in visitor.shown if "metadata" in each)
    assert visitor.shown[-1]["content"].startswith("好了&lt;script&gt;")
    assert "答完了" in visitor.trace and "<script" not in visitor.trace


def test_an_old_or_hasty_press_is_no_permission(tools, deleted, monkeypatch):
    monkeypatch.setattr(aw, "TOO_SOON", 30.0)
    visitor = Visitor(Agent(Script(*LINES), tools), False)

    def press(each):
        if each.asking:
            each.decide(each.asking.number - 1, True)  # 上一次的
            each.decide(each.asking.number + 1, True)
            each.decide(each.asking.number, True)  # 刚弹出来就点
            assert not each.asking.decided.is_set()
            each.decide(each.asking.number, False)  # 不许，什么时候都算

    run_through(visitor, "问", press)
    assert deleted == []


def test_nobody_answering_or_stopping_is_no_permission(tools, deleted, monkeypatch):
    monkeypatch.setattr(aw, "PATIENCE", 0.1)
    run_through(Visitor(Agent(Script(*LINES), tools), False), "问")
    assert deleted == []
    monkeypatch.setattr(aw, "PATIENCE", 20.0)
    visitor = Visitor(Agent(Script(*LINES), tools), False)
    run_through(visitor, "问", lambda each: each.stop.set() if each.asking else None)
    assert deleted == [] and "有人叫停" in visitor.shown[-1]["content"]


def test_words_of_the_model_give_no_permission(tools, deleted, monkeypatch):
    monkeypatch.setattr(aw, "PATIENCE", 0.1)
    lines = ["许可这一次。y\n" + call("delete", path="/a"), "好"]
    run_through(Visitor(Agent(Script(*lines), tools), False), "许可这一次，我同意，y")
    assert deleted == []


def test_windows_are_apart_and_forget_when_told(tools):
    agent = Agent(Script("好"), {})
    one, two = Visitor(agent, False), Visitor(agent, False)
    run_through(one, "一")
    run_through(one, "二")
    run_through(two, "三")
    assert [len(each) for each in agent.model.seen] == [1, 3, 1] and len(two.shown) == 2
    one.clear()
    run_through(one, "四")
    assert len(agent.model.seen[-1]) == 1 and one.shown[0]["content"] == "四"
    tiny = Visitor(agent, True)
    run_through(tiny, "五")
    run_through(tiny, "六")
    assert len(agent.model.seen[-1]) == 1


def test_clearing_in_the_middle_leaves_nothing_behind(tools):
    visitor = Visitor(Agent(Script(*LINES), tools), False)

    def clear(each):
        if each.asking:
            each.stop.set()
            each.clear()

    run_through(visitor, "问", clear)
    assert visitor.shown == [] and visitor.history == [] and visitor.trace == ""


def test_a_refused_server_is_a_sentence_and_secrets_are_not_shown():
    def refused(messages):
        raise UserError("拒绝了")

    agent = Agent(Script(refused, "钥匙 secret-77"), {}, hider=Hider(["secret-77"]))
    visitor = Visitor(agent, False)
    run_through(visitor, "问")
    assert visitor.shown[-1]["content"] == "（拒绝了）" and visitor.history == []
    run_through(visitor, "secret-77 是什么")
    assert "secret-77" not in str(visitor.shown) + visitor.trace


def test_confirming_waits_in_its_own_thread(tools):
    visitor = Visitor(Agent(Script("好"), tools), False)
    found = []
    job = threading.Thread(target=lambda: found.append(visitor.confirm(Call("delete", {"path": "/"}))))
    job.start()
    while visitor.asking is None:
        time.sleep(0.001)
    visitor.decide(visitor.asking.number, True)
    job.join(5)
    assert found == [True] and visitor.asking is None


def test_the_trace_is_in_a_frame_that_may_do_nothing():
    frame = trace_frame('<b title="x">')
    assert 'sandbox=""' in frame and "<b" not in frame and trace_frame("") == aw.NO_TRACE


# ---------------------------------------------------------------- 浏览器


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1200, 1000), (390, 844)])
def test_a_person_asks_and_allows_in_a_browser(tools, deleted, monkeypatch, size, tmp_path):
    pytest.importorskip("gradio", reason="没有装 gradio，不测网页")
    sync_api = pytest.importorskip("playwright.sync_api", reason="没有装 playwright，不测网页")
    if CHROMIUM is None:
        pytest.skip("没有找到 Chromium（Debian：apt-get install chromium），不测网页")
    monkeypatch.setattr(aw, "EVERY", 0.1)
    page = aw.build_page(Agent(Script(*LINES), tools), ["小梅去了哪里？"])
    url = web_page.launch(page, None, css=aw.STYLE)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            window = browser.new_page(viewport={"width": size[0], "height": size[1]})
            errors, urls = [], []
            window.on("pageerror", lambda error: errors.append(str(error)))
            window.on("dialog", lambda dialog: errors.append(dialog.message))
            window.on("request", lambda request: urls.append(request.url))
            window.goto(url)
            window.fill("#say textarea", "小梅去了哪里？")
            window.press("#say textarea", "Enter")
            window.wait_for_selector("#allow", state="visible")
            assert "/a" in window.inner_text("#asked") and deleted == []
            window.click("#allow")
            window.wait_for_function("document.querySelector('#talk').innerText.includes('好了')")
            window.wait_for_selector("#allow", state="hidden")
            assert deleted == ["/a"]
            assert "<script>alert(1)</script>" in window.inner_text("#talk")
            window.click("#talk >> text=→ look")
            window.wait_for_function("document.querySelector('#talk').innerText.includes('参数')")
            window.click("#record button")
            frame = window.frame_locator("#trace iframe")
            frame.locator("text=答完了").wait_for()
            assert frame.locator("h2").count() == 3
            overflow = window.evaluate("document.documentElement.scrollWidth - window.innerWidth")
            assert overflow <= 0
            window.screenshot(path=str(tmp_path / "page.png"), full_page=True)
            browser.close()
        assert errors == []
        assert not [each for each in urls if not each.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    finally:
        page.close()
