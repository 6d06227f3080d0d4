"""沙箱里的两个进程；由 sandbox.py 用 ``python -I -S -B`` 启动，不给读者直接运行，也不导入本仓库的任何东西。

    sandbox_child.py judge     出题人：拿着测试，另开一个进程放答案；测试调用函数时，把参数写给它，把返回值读回来
    sandbox_child.py answer    答题人：只有答案的代码，看不到测试；没有写文件、联网、开进程的份

两边之间只有 JSON 写的普通数据。所以答案骗不了测试：它碰不到断言，改不了 ==，返回的对象到那边只剩下数据；它自己退出，
那边就读到管道断了。判分的是出题人，答案不在那个进程里。
"""

import builtins
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import threading

OUTPUT_CHARS = 9000  # 测试放在 output 里的文字，最多几个字：判决是一行，不能太长
AT_MOST = 4 << 20  # 一次参数、一个返回值最多多少字节

# 答案那边不许做的事（Python 的审计事件）→ 怎么说。做了就当场结束，它来不及改口。
FORBIDDEN = {
    "开进程": (
        "os.fork",
        "os.forkpty",
        "os.exec",
        "os.posix_spawn",
        "os.spawn",
        "os.system",
        "os.startfile",
        "subprocess.Popen",
        "pty.spawn",
        "_winapi.CreateProcess",
    ),
    "结束别的进程": ("os.kill", "os.killpg", "signal.pthread_kill", "_winapi.TerminateProcess"),
    "改动文件": (
        "os.remove",
        "os.rename",
        "os.rmdir",
        "os.mkdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.chmod",
        "os.chown",
        "os.lchown",
        "os.chflags",
        "os.utime",
        "os.setxattr",
        "os.removexattr",
        "shutil.rmtree",
        "shutil.move",
        "shutil.copyfile",
        "shutil.copytree",
        "shutil.make_archive",
        "shutil.unpack_archive",
        "winreg.CreateKey",
        "winreg.SetValue",
        "winreg.DeleteKey",
        "winreg.DeleteValue",
    ),
    "联网": (
        "socket.connect",
        "socket.bind",
        "socket.sendto",
        "socket.sendmsg",
        "socket.getaddrinfo",
        "socket.gethostbyname",
        "socket.gethostbyaddr",
        "socket.getnameinfo",
    ),
    "绕过限制": (
        "resource.setrlimit",
        "resource.prlimit",
        "ctypes.dlopen",
        "ctypes.dlsym",
        "ctypes.call_function",
        "gc.get_objects",
        "gc.get_referrers",
        "gc.get_referents",
        "sqlite3.enable_load_extension",
        "_winapi.OpenProcess",
    ),
}
# 导入了就能绕过上面这些的模块（C 里直接开进程、开文件，不经过审计）
NOT_IMPORTED = frozenset(
    ("ctypes", "_ctypes", "_posixsubprocess", "_winapi", "_dbm", "_gdbm", "_testcapi", "_xxsubinterpreters")
)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


# ---------------------------------------------------------------- 1. 普通数据 ↔ JSON


def pack(value):
    """普通数据 → 能写成 JSON 的；继承它们的类（Counter、namedtuple）变回本来的。别的是 TypeError。"""
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return int.__add__(value, 0)  # 继承 int 的类也变回 int
    if isinstance(value, float):
        return float.__add__(value, 0.0)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(each)] for key, each in dict.items(value)]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(each) for each in kind.__iter__(value)]}
    raise TypeError(f"{type(value).__name__} 不是普通的数据（数、字、列表、字典 …），过不了管道")


def unpack(packed):
    """pack 的反面。"""
    if not isinstance(packed, dict):
        return packed
    [(kind, content)] = packed.items()
    if kind == "bytes":
        return bytes.fromhex(content)
    if kind == "complex":
        return complex(*content)
    if kind == "dict":
        return {unpack(key): unpack(each) for key, each in content}
    kinds = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[kind](unpack(each) for each in content)


def send(stream, message):
    stream.write(json.dumps(message).encode("ascii") + b"\n")
    stream.flush()


def receive(stream):
    """一行 → 一条消息；断了是 None，太长是 ValueError。"""
    line = stream.readline(AT_MOST + 1)
    if not line.endswith(b"\n"):
        if len(line) > AT_MOST:
            raise ValueError("太长")
        return None
    return json.loads(line)


# ---------------------------------------------------------------- 2. 限制


def limit_resources(limits):
    """内存、CPU 秒数、写文件、开进程：有 resource 模块的系统由内核管着；没有的（Windows）什么也不做。返回设上了哪些。"""
    try:
        import resource
    except ImportError:
        return []
    done = []
    memory = limits["memory_mb"] << 20
    seconds = int(limits["seconds"]) + 2
    wanted = {
        "RLIMIT_AS": memory,
        "RLIMIT_DATA": memory,
        "RLIMIT_CPU": seconds,
        "RLIMIT_FSIZE": 0,  # 一个字节也写不进文件；管道不算
        "RLIMIT_CORE": 0,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_NPROC": 0,  # 不能再开进程、线程；root 不受它管
    }
    for name, value in wanted.items():
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
            done.append(name)
        except (AttributeError, ValueError, OSError):  # 这个系统没有，或不让设：macOS 的 RLIMIT_AS 就是
            continue
    return done


def refuse_processes():
    """C 里开进程的函数换掉；Linux 上再请内核一起拦着（sandbox_seccomp.py）。返回内核答应了没有。"""
    kernel = False
    here = os.path.dirname(os.path.realpath(__file__))
    if sys.platform.startswith("linux"):
        sys.path.insert(0, here)
        try:
            import sandbox_seccomp

            kernel = sandbox_seccomp.install()
        except (ImportError, OSError, AttributeError):
            pass  # 没有 ctypes，或内核不让装
        sys.path.remove(here)
    for name in ("_posixsubprocess", "_winapi"):
        for function in ("fork_exec", "CreateProcess"):
            if hasattr(sys.modules.get(name), function):
                setattr(sys.modules[name], function, refuse)
    subprocess._fork_exec = refuse
    for name in list(sys.modules):
        if name.split(".")[0] in {"sandbox_seccomp", *NOT_IMPORTED} - {"_posixsubprocess", "_winapi"}:
            del sys.modules[name]
    return kernel


def refuse(*_):
    sys.audit("os.fork")


def forbid(reply_fd):
    """装上审计钩子：做了 FORBIDDEN 里的事就报告一句、结束进程。钩子装上就拆不掉。"""
    named = {event: what for what, events in FORBIDDEN.items() for event in events}
    readable = tuple(
        os.path.realpath(place) + os.sep for place in {sys.base_prefix, os.path.dirname(os.__file__)}
    )
    unix = getattr(__import__("socket"), "AF_UNIX", None)
    # 用到的都先取到手：答案再改这些模块，这里不受影响
    write, leave, realpath, fspath, decode = os.write, os._exit, os.path.realpath, os.fspath, os.fsdecode
    dumps = json.dumps
    forbidden_imports, writes = NOT_IMPORTED, WRITES

    def stop(what, event):
        write(reply_fd, dumps({"forbidden": what, "event": event}).encode("ascii") + b"\n")
        leave(3)

    def look(event, arguments):
        if event == "import":
            if arguments[0].split(".")[0] in forbidden_imports:
                raise ImportError(f"沙箱里不能导入 {arguments[0]}")
        elif event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            if flags and flags & writes:
                stop("改动文件", event)
            if not (realpath(decode(fspath(path))) + "/").startswith(readable):
                raise PermissionError(f"沙箱里只读得到 Python 自带的文件，读不到 {path}")
        elif event == "socket.__new__":
            if unix is None or arguments[1] != unix:
                stop("联网", event)
        elif event == "sqlite3.connect":
            if arguments[0] != ":memory:":
                stop("改动文件", event)
        elif event == "object.__setattr__":
            if arguments[1] in ("__code__", "cell_contents"):
                stop("绕过限制", event)
        elif event in named:
            stop(named[event], event)

    sys.addaudithook(look)


# ---------------------------------------------------------------- 3. 答题人


def answer():
    """运行答案，然后一次次地：读参数、调用、写返回值。"""
    requests = os.fdopen(os.dup(0), "rb")
    reply_fd = os.dup(1)
    replies = os.fdopen(reply_fd, "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)  # input() 立刻读完
    os.dup2(2, 1)  # 打印的都去标准错误，那边数着
    job = receive(requests)
    send(replies, {"up": os.getpid()})
    if receive(requests) is None:  # 出题人记下了进程号，才开始
        return
    held = limit_resources(job["limits"])
    if refuse_processes():  # 在限制之后：装上以后，连限制也改不了
        held.append("seccomp")
    forbid(reply_fd)
    builtins.exit = builtins.quit = sys.exit  # -S 没有这两个
    space = {"__name__": "answer"}
    reply = attempt(load, (job["answer"], job["entry_point"], space))
    send(replies, reply | {"held": held})
    while (request := receive(requests)) is not None:
        send(replies, attempt(call, (space[job["entry_point"]], request)))


def load(source, entry_point, space):
    exec(compile(source, "answer.py", "exec"), space)
    if not callable(space.get(entry_point)):
        raise NameError(f"答案里没有函数 {entry_point}")
    return {"loaded": True}


def call(function, request):
    args, kwargs = unpack(request["args"]), unpack(request["kwargs"])
    value = function(*args, **kwargs)
    return {"value": pack(value), "args": pack(args)}  # 参数也送回去：有的题就地改参数


def attempt(action, arguments):
    """做一步 → 一条回话；出了什么错也是回话。"""
    try:
        return action(*arguments)
    except SystemExit as error:
        return {"exited": repr(error.code)[:200]}
    except BaseException as error:
        name = next(c.__name__ for c in type(error).__mro__ if c.__module__ == "builtins")
        return {"raised": name, "said": f"{type(error).__name__}: {error}"[:300]}


# ---------------------------------------------------------------- 4. 出题人


class NoVerdict(BaseException):
    """答案那边完了（断了、被禁、输出太多）：测试里的 except Exception 接不住它。"""

    def __init__(self, kind, detail):
        super().__init__(kind)
        self.kind, self.detail = kind, detail


class Output:
    """数着答案打印了多少；超过就结束它。只留开头的几百个字节。"""

    def __init__(self, worker, limit):
        self.worker, self.limit, self.bytes, self.too_much, self.head = worker, limit, 0, False, b""

    def drain(self):
        while piece := os.read(self.worker.stderr.fileno(), 1 << 16):
            self.bytes += len(piece)
            self.head = (self.head + piece)[:500]
            if self.bytes > self.limit and not self.too_much:
                self.too_much = True
                self.worker.kill()


class Candidate:
    """测试调用的"函数"：参数写给答题人，等它的返回值。"""

    def __init__(self, worker, output):
        self.worker, self.output, self.over = worker, output, None

    def __call__(self, *args, **kwargs):
        self.ask({"args": pack(list(args)), "kwargs": pack(kwargs)})
        reply = self.listen()
        if "raised" in reply:
            raise as_error(str(reply["raised"]), str(reply["said"]))
        try:
            value, changed = unpack(reply["value"]), unpack(reply["args"])
            pairs = list(zip(args, changed, strict=True))
        except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
            self.over = NoVerdict("error", "回话不成样子")
            raise self.over from None
        for mine, theirs in pairs:
            if type(mine) is list:
                mine[:] = theirs
            elif type(mine) in (dict, set):
                mine.clear()
                mine.update(theirs)
        return value

    def ask(self, message):
        if self.over:
            raise self.over
        with contextlib.suppress(OSError):  # 那边没了：listen 会说是为什么
            send(self.worker.stdin, message)

    def listen(self):
        try:
            reply = receive(self.worker.stdout)
        except ValueError:
            reply = 0
            self.over = NoVerdict("output", "返回的东西太大，或不成样子")
        if self.over:
            raise self.over
        if reply is None:
            code = self.worker.wait()
            kind = "output" if self.output.too_much else "exited"
            detail = f"打印了 {self.output.bytes} 字节以上" if self.output.too_much else f"退出码 {code}"
            self.over = NoVerdict(kind, detail)
        elif not isinstance(reply, dict):
            self.over = NoVerdict("error", "回话不成样子")
        elif "forbidden" in reply:
            self.over = NoVerdict("forbidden", f"{reply['forbidden']}（{reply.get('event', '')}）")
        elif "exited" in reply:
            self.over = NoVerdict("exited", f"exit({reply['exited']})")
        elif reply.get("raised") == "MemoryError":
            self.over = NoVerdict("memory", "内存不够")
        if self.over:
            raise self.over
        return reply


def as_error(name, said):
    """答案那边的异常，在这边照样抛出：测试可能要它抛 ValueError。"""
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(said)
        except TypeError:  # UnicodeDecodeError 之类要几个参数
            pass
    return RuntimeError(said)


def judge():
    """读一份考卷，另开进程放答案，运行测试，写出判决。"""
    verdicts = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)  # 测试自己打印的不混进判决
    paper = receive(sys.stdin.buffer)
    worker = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", "-X", "utf8", __file__, "answer"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=paper["folder"],
    )
    threading.Thread(target=watch_parent, args=(worker, paper["folder"]), daemon=True).start()
    output = Output(worker, paper["limits"]["output_bytes"])
    reader = threading.Thread(target=output.drain, daemon=True)
    reader.start()
    send(worker.stdin, {name: paper[name] for name in ("answer", "entry_point", "limits")})
    receive(worker.stdout)
    send(verdicts, {"answer_pid": worker.pid})
    verdict = examine(paper, worker, output)
    worker.kill()
    worker.wait()
    reader.join(1)
    if output.too_much and verdict["kind"] == "passed":
        verdict = {"kind": "output", "detail": f"打印了 {output.bytes} 字节以上"}
    send(verdicts, verdict | {"seal": paper["seal"]})
    verdicts.close()
    os._exit(0)


def watch_parent(worker, folder):
    """评测的主进程没了（标准输入断了），这里也不留下什么。"""
    while os.read(0, 1024):
        pass
    shutil.rmtree(folder, ignore_errors=True)  # 先删：答案一死，主线程就写判决、退出，等不到后面
    worker.kill()
    worker.wait()
    shutil.rmtree(folder, ignore_errors=True)  # Windows：进程还在里面时删不掉
    os._exit(1)


def examine(paper, worker, output):
    """→ {"kind", "detail"}；只有测试从头到尾走完才是 passed。"""
    candidate = Candidate(worker, output)
    limit_memory_of_tests(paper["limits"])
    space = {"__name__": "test"}
    done = secrets.token_hex(8)
    try:
        send(worker.stdin, {"begin": True})
        loaded = candidate.listen()
        if "raised" in loaded:
            kind = "syntax" if loaded["raised"] in ("SyntaxError", "IndentationError") else "error"
            return {"kind": kind, "detail": loaded["said"]}
        exec(compile(paper["helpers"], "prompt.py", "exec"), space)  # 题面里的其他函数，测试可能要用
        space[paper["entry_point"]] = candidate
        exec(compile(paper["test"], "test.py", "exec"), space)
        if callable(space.get("check")):
            space["check"](candidate)
        finished = done
    except NoVerdict as end:
        return {"kind": end.kind, "detail": end.detail}
    except AssertionError as error:
        return {"kind": "wrong", "detail": (str(error) or "断言不成立")[:300]}
    except BaseException as error:
        if isinstance(error, MemoryError):
            return {"kind": "memory", "detail": "内存不够"}
        return {"kind": "error", "detail": f"{type(error).__name__}: {error}"[:300]}
    if candidate.over:  # 测试把它接住了，也不算
        return {"kind": candidate.over.kind, "detail": candidate.over.detail}
    return {
        "kind": "passed" if finished == done else "error",
        "detail": "",
        "held": loaded.get("held", []),
        "output": str(space.get("output", ""))[:OUTPUT_CHARS],
    }


def limit_memory_of_tests(limits):
    """测试是题目文件里的，信它；只防返回值大得离谱。"""
    try:
        import resource

        memory = 2 * limits["memory_mb"] << 20
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    except (ImportError, AttributeError, ValueError, OSError):
        pass


if __name__ == "__main__":
    {"judge": judge, "answer": answer}[sys.argv[1]]()
