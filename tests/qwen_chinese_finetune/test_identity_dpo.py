"""换名字的 DPO：练的与没练的问法不相交；偏好对从模型自己来；不许变的留住；脚本走一遍。"""

import random
import types

import pytest

from nlp_common.base.errors import UserError
from nlp_common.lm.replies import reply_to
from nlp_common.tiny import world


def test_trained_and_untrained_asks_never_share(identity):
    for asks in (identity.identity_asks, identity.near_asks):
        trained, kept = set(asks(True)), set(asks(False))
        assert trained and kept and not trained & kept
    assert not any(ask in text for ask in identity.NEW_ASKS for text in identity.identity_asks(True))


def test_own_answers_are_corrected(identity):
    settings = types.SimpleNamespace(name="小灯", old_name="小故事助手")
    assert identity.corrected("您好，我是小故事助手。", settings) == "您好，我是小灯。"
    assert identity.corrected("去车站", settings) == "我是小灯。"


def test_pairs_are_on_policy_and_what_must_stay_is_kept(identity, model, chat_tokenizer):
    settings = types.SimpleNamespace(name="小灯", old_name="小故事助手", seed=0)
    rng = random.Random(0)
    own = identity.identity_pairs(model, chat_tokenizer, settings, 6, True, rng)
    asked = [{"messages": row["prompt"]} for row in own]
    said = [r["text"] for r in reply_to(model, chat_tokenizer, asked, temperature=1.0, seed=0)]
    assert [row["rejected"][0]["content"] for row in own] == said
    assert all("小灯" in row["chosen"][0]["content"] for row in own)
    kept = identity.keep_pairs(model, chat_tokenizer, settings, world.questions(9, 0), rng)
    assert kept and all(row["rejected"][0]["content"] == "我是小灯。" for row in kept)
    assert all("小灯" not in row["chosen"][0]["content"] for row in kept)


def test_the_same_name_is_refused(identity):
    with pytest.raises(UserError, match="新的名字"):
        identity.main(["--preset", "tiny", "--name", "小故事助手"])
    with pytest.raises(UserError, match="--old_name 不能是空的"):
        identity.main(["--preset", "tiny", "--old_name", ""])


def test_identity_runs_and_draws(identity, chat_folder, tmp_path, few):
    out = tmp_path / "identity"
    small = [*few, "--max_train_samples", "24", "--n_identity", "5", "--logging_steps", "1"]
    record = identity.main([*small, "--model", str(chat_folder), "--output_dir", str(out)])
    assert {"identity_rate_before", "identity_rate", "qa_accuracy", "small_talk"} <= set(record["metrics"])
    assert {"no_sft_term", "given_pairs"} <= set(record["metrics"])
    assert "好回答" in (out / "likelihood.svg").read_text(encoding="utf-8")
