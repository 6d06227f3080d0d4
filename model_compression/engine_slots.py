"""别的引擎怎样坐座位：ONNX Runtime、OpenVINO 的"一步"（engines.py）要整块的 K、V；llama.cpp 自己排座位。"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

from batching import Job, Line
from nlp_common.lm.generation import pad_left, padded_positions
from slot_model import SlotCache


class EngineSlots:
    """engines.Engine 的 step：K、V 进去，长了一列的出来。座位上的缓存取前 width 列给它，新的那一列抄回来。

    各行长短不一：短的行，后面几列用掩码盖住；新的那一列总在最后，位置照各行自己的数。
    """

    def __init__(self, engine, slots: int, context: int):
        self.engine, self.slots, self.context = engine, slots, context
        self.cache = SlotCache(engine.config, slots, context, torch.float32, torch.device("cpu"))
        self.n_layers = engine.config.num_hidden_layers

    @torch.inference_mode()
    def prefill(self, prompts: list[list[int]]) -> torch.Tensor:
        """它只给最后一列的 logits，所以左填充；抄进缓存时，填充的几列不要。"""
        ids, mask = pad_left(prompts, self.engine.tokenizer.pad_token_id)  # (n, T)
        logits, past = self.engine.step(ids, mask, padded_positions(mask), None)
        first, width = len(self.cache.lengths), ids.shape[1]
        for row, prompt in enumerate(prompts):
            for layer in range(self.n_layers):
                self.cache.keys[layer, first + row, :, : len(prompt)] = past[2 * layer][
                    row, :, width - len(prompt) :
                ]
                self.cache.values[layer, first + row, :, : len(prompt)] = past[2 * layer + 1][
                    row, :, width - len(prompt) :
                ]
        self.cache.lengths += [len(prompt) for prompt in prompts]
        return logits.float()

    @torch.inference_mode()
    def step(self, tokens: list[int]) -> torch.Tensor:
        cache = self.cache
        n, width = len(cache.lengths), max(cache.lengths)
        places = torch.tensor(cache.lengths)  # (n,)
        seen = torch.arange(width) < places[:, None]  # (n, width)
        mask = torch.cat([seen, torch.ones(n, 1, dtype=torch.bool)], 1).long()
        past = []
        for layer in range(self.n_layers):
            past += [
                cache.keys[layer, :n, :, :width].contiguous(),
                cache.values[layer, :n, :, :width].contiguous(),
            ]
        logits, past = self.engine.step(torch.tensor(tokens)[:, None], mask, places[:, None], past)
        rows = torch.arange(n)
        for layer in range(self.n_layers):
            cache.keys[layer, rows, :, places] = past[2 * layer][:, :, -1]
            cache.values[layer, rows, :, places] = past[2 * layer + 1][:, :, -1]
        cache.lengths = [length + 1 for length in cache.lengths]
        return logits.float()

    def drop(self, row: int) -> None:
        self.cache.drop(row)


class LlamaBatcher(Line):
    """llama.cpp 里面有自己的圈：一个请求一个线程交给它，这里只管队伍与座位的数（圈数数不到）。与 batching.Batcher 一样地用。"""

    def __init__(
        self, engine, slots: int, most_waiting: int = 64, finished: Callable[[Job], None] = lambda job: None
    ):
        super().__init__(slots, most_waiting, finished)
        self.engine = engine

    def submit(self, job: Job) -> None:
        super().submit(job)
        threading.Thread(target=self._answer, args=(job,), daemon=True).start()

    def _answer(self, job: Job) -> None:
        with self.changed:
            while (
                not job.left
                and not job.end
                and (len(self.seated) >= self.slots or self.waiting[0] is not job)
            ):
                self.changed.wait(0.2)
            self.waiting.remove(job)
            self.seated.append(job)
            self.changed.notify_all()  # 排在后面的，现在是第一个了
        try:
            if not job.left and not job.end:
                self._speak(job)
        except Exception as error:
            job.finish(f"error {type(error).__name__}：{error}")
        job.finish("cancelled" if job.left else "length")
        with self.changed:
            self.seated.remove(job)
            self.changed.notify_all()
        self.finished(job)

    def _speak(self, job: Job) -> None:
        tokens = self.engine.stream(
            [job.prompt], job.max_tokens, temperature=job.temperature, top_p=job.top_p, seed=job.seed % 2**32
        )
        try:
            for _, token in tokens:
                job.take(token)
                if job.end or job.left:
                    return
        finally:
            tokens.close()

    def close(self, grace: float = 0.0) -> None:
        with self.changed:
            self.closed = True
            self.changed.wait_for(lambda: not self.seated and not self.waiting, grace)
            self.stop_all()
            self.changed.notify_all()
            self.changed.wait_for(lambda: not self.seated and not self.waiting, 10.0)
