"""BERT 脚本的 --dry_run：参数个数与真模型一样，激活的公式与前向实际留下的相差不到一成，步数与 Trainer 的一样。"""

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, Trainer, TrainingArguments

from nlp_common.base.errors import UserError
from nlp_common.tiny.bert import small_config
from nlp_common.train import bert
from nlp_common.train import dry_run_bert as bert_dry_run
from nlp_common.train.dry_run import count


def kept_by_forward(model, ids, half: bool) -> int:
    """前向真正为反向留下多少字节；权重和它的 2 字节副本不算。"""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept, alive = {}, []

    def pack(tensor):
        storage = tensor.untyped_storage()
        copied = tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
        if storage.data_ptr() not in weights and not copied:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=half),
    ):
        model(input_ids=ids)
    return sum(kept.values())


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("layers", "length"), [(2, 16), (4, 96)])
def test_activations_are_within_a_tenth_of_what_is_really_kept(half, layers, length):
    config = small_config(500, 128, layers)
    model = BertForSequenceClassification._from_config(config, attn_implementation="eager").train()
    ids = torch.randint(5, 500, (6, length), generator=torch.Generator().manual_seed(0))
    formula = bert_dry_run.saved_bytes(config, ids.numel(), length, half, eager=True)
    assert formula == pytest.approx(kept_by_forward(model, ids, half), rel=0.1)


def test_bert_base_chinese_has_its_published_size():
    config = bert_dry_run.bert_base_chinese()
    h, inner = 768, 3072
    layer = 4 * (h * h + h) + 2 * h * inner + inner + h + 4 * h
    by_hand = (21128 + 512 + 2) * h + 2 * h + 12 * layer + h * h + h + 2 * h + 2
    assert count(lambda: BertForSequenceClassification(config))[0] == by_hand == 102_269_186


def test_parameters_and_steps_are_those_of_the_real_run(tmp_path):
    config = small_config(60, 32, 1)
    settings = bert.BertSettings(per_device_train_batch_size=8, max_length=20)
    model = BertForMaskedLM(config)
    result = bert_dry_run.estimate(settings, config, [9, 10, 20] * 9, 2.5, half=False, mlm=True)
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert result["mean_length"] == 13 and result["tokens_per_step"] == 160
    rows = [{"input_ids": [2, 5, 3], "labels": [2, 5, 3]}] * 27
    args = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8,
        num_train_epochs=2.5,
        report_to="none",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    assert result["steps"] == trainer.state.max_steps


def settings_for(**changes):
    values = {"preset": "full", "max_length": 128, "per_device_train_batch_size": 8, "source": "hf"}
    return bert.BertSettings(**values | changes)


def test_full_without_a_network_uses_the_built_in_sizes_and_warns(monkeypatch, capsys):
    monkeypatch.setattr(bert_dry_run, "find_model", lambda *_: None)
    monkeypatch.setattr(bert_dry_run, "device_bytes", lambda _: 2**30)
    result = bert_dry_run.dry_run(settings_for(), 2, {"微调": ([128] * 9600, 1.0)})["微调"]
    assert result["steps"] == 1200 and result["fits"] is False and "seconds_per_step" not in result
    assert result["total"] > 16 * 102_269_186
    printed = capsys.readouterr().out
    assert all(
        part in printed for part in ("内置的尺寸表", "102,269,186 个参数", "警告：需要", "没有实测时间")
    )
    with pytest.raises(UserError, match="some/bert"):
        bert_dry_run.dry_run(settings_for(model="some/bert"), 2, {"微调": ([9], 1.0)})


def test_a_small_model_is_timed(capsys):
    stages = {"预训练": ([9] * 40, 1.0), "微调": ([9] * 20, 2.0)}
    results = bert_dry_run.dry_run(settings_for(preset="tiny"), 15, stages, small_config(60, 32, 1))
    assert [result["steps"] for result in results.values()] == [5, 6]
    assert all(result["seconds_per_step"] > 0 and result["fits"] for result in results.values())
    assert results["预训练"]["activations"] > results["微调"]["activations"]  # 多了猜字的输出层
    assert "实测三步" in capsys.readouterr().out


def test_only_the_upper_layers_are_counted_and_their_inputs_kept(tmp_path, capsys, monkeypatch):
    config = small_config(5000, 64, 4)
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(bert_dry_run, "find_model", lambda name, source: str(tmp_path))
    settings = bert.BertSettings(
        model="e5", per_device_train_batch_size=4, max_length=20, train_layers=1, bf16=False
    )
    result = bert_dry_run.dry_run(settings, 2, {"微调": ([10] * 40, 2.0)})["微调"]
    model = BertForSequenceClassification(config)
    upper = [*model.bert.encoder.layer[3:].parameters(), *model.classifier.parameters()]
    small = sum(p.numel() for p in upper)  # 另有嵌入的几百行位置，与不用的 [CLS] 层
    assert result["parameters"] == sum(p.numel() for p in model.parameters())
    assert small < result["trained"] < small + 520 * 64 + 100 * 64 + 64 * 64 + 1000
    shown = capsys.readouterr().out
    assert (
        "只训练上面 1 层" in shown and "下面各层过一遍训练数据约" in shown and result["seconds_per_step"] > 0
    )
    settings.train_layers = 0
    assert "seconds_per_step" not in bert_dry_run.dry_run(settings, 2, {"微调": ([10] * 40, 2.0)})["微调"]
