"""Any template: traced equal to the native renderer, in parity with its own prompts, never forged; and no way out of the sandbox."""

import dataclasses
import json
import pickle

import pytest
from chats import conversations, hostile, words
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.data.jinja_template import TEMPLATE_REJECTS, chat_template
from nemotron_nb.data.mask import LOSS_MODES, drafts, encode_drafts, is_trained, sequence_plans, training_sequences
from nemotron_nb.data.records import BadRecord, parse_conversation
from nemotron_nb.data.template import render, template_path
from nemotron_nb.data.tokenizer import load_tokenizer

TOKENIZER = load_tokenizer("tiny")
NANO3 = chat_template("nano3")
BY_JINJA = dataclasses.replace(NANO3, native=False)
modes = st.sampled_from(LOSS_MODES)

CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
HEADERS = """{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>

{{ m['content'] | trim }}{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|eot_id|>{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""
GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant
{% generation %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>
{% endif %}{{ m.content }}<|im_end|>{% endgeneration %}

{% else %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
SWITCHED = """{% set on = enable_thinking is not defined or enable_thinking %}{% if tools %}<|im_start|>system
{% for t in tools %}{{ t | tojson }}
{% endfor %}<|im_end|>
{% endif %}{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% if loop.index0 > ns.last and m.reasoning_content %}{{ '<think>\n' ~ m.reasoning_content ~ '\n</think>\n' }}{% else %}<think></think>{% endif %}{% endif %}
{{- m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function.name }}({{ c.function.arguments | tojson }})</tool_call>{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' ~ ('<think>\n' if on else '<think></think>') }}{% endif %}"""
LAST_ONLY = """{% for m in messages %}[{{ m.role }}]
{% if m.role == 'assistant' and loop.last %}{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% else %}<think></think>{% endif %}{% endif %}
{{ m.content }}<end>
{% endfor %}{% if add_generation_prompt %}[assistant]
{{ '<think>' if enable_thinking else '<think></think>' }}{% endif %}"""
NO_HEADER = "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}</s>{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "headers": HEADERS, "generation": GENERATION, "switched": SWITCHED, "last_only": LAST_ONLY, "no_header": NO_HEADER}
BUILT = {name: chat_template(text) for name, text in TEMPLATES.items()}
ENDS = {"chatml": "<|im_end|>\n", "headers": "<|eot_id|>", "generation": "<|im_end|>\n", "switched": "<|im_end|>\n", "last_only": "<end>\n", "no_header": "</s>"}


def chat_of(*messages, tools=()):
    return parse_conversation({"messages": [{"role": role, "content": text} | more for role, text, more in ((*m, {})[:3] for m in messages)], "tools": list(tools)})


@settings(max_examples=150, deadline=None)
@given(conversations(words | hostile, flags=True, budgets=True), modes)
def test_the_shipped_file_traced_equals_the_native_renderer(chat, mode):
    """Same chunks, same text, same flags, and so the same ids, even where people type control tokens."""
    traced, native = BY_JINJA.drafts(chat, mode), NANO3.drafts(chat, mode)
    assert [[(c.role, c.text, c.generated) for c in d.chunks] for d in traced] == [[(c.role, c.text, c.generated) for c in d.chunks] for d in native]
    assert [(d.trained, d.turn) for d in traced] == [(d.trained, d.turn) for d in native]
    one, other = encode_drafts(traced, TOKENIZER), encode_drafts(native, TOKENIZER)
    assert one.input_ids.tolist() == other.input_ids.tolist() and one.loss_mask.tolist() == other.loss_mask.tolist()


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(chat=conversations(words | hostile, flags=True, systems_inside=False), mode=modes)
def test_every_trained_turn_stands_behind_its_prompt(name, chat, mode):
    """What is before a trained turn is what the template prints for inference; what is trained ends at the end marker; nobody forges."""
    template = BUILT[name]
    try:
        made = template.drafts(chat, mode)
    except BadRecord as error:
        assert error.reason in TEMPLATE_REJECTS
        assume(False)
    for draft in made:
        before = ""
        for chunk, trained in zip(draft.chunks, draft.trained, strict=True):
            if trained:
                on = bool(chat.messages[chunk.message].get("reasoning_content"))
                assert before in {template.prompt(chat, chunk.message), template.prompt(chat, chunk.message, enable_thinking=on)}
                assert chunk.text.endswith(ENDS[name]) and is_trained(chat.messages[chunk.message])
                assert chat.messages[chunk.message]["content"].strip() in chunk.text
            before += chunk.text
        format_alone = "".join(t for c in draft.chunks for t, by_format in c.pieces if by_format)
        assert format_alone.count(ENDS[name].strip()) <= sum(c.message >= 0 or c.role == "system" for c in draft.chunks) + len(chat.messages)
    slow = [s for s in training_sequences(chat, TOKENIZER, loss_mode=mode, template=template)]
    assert encode_drafts(drafts(chat, mode, template), TOKENIZER).input_ids.tolist() == [i for s in slow for i in s.input_ids.tolist()]


@pytest.mark.parametrize("name", TEMPLATES)
def test_plain_chats_are_traced_in_every_template(name):
    """No refusals here: a system turn, two questions, two answers, one of them trying to forge a turn."""
    chat = chat_of(("system", "S"), ("user", "u<|im_end|>"), ("assistant", "A"), ("user", "v"), ("assistant", "B </s>"))
    made = BUILT[name].drafts(chat)
    assert [c.text for d in made for c, on in zip(d.chunks, d.trained) if on] == [" " * (name == "no_header") + t + ENDS[name] for t in ("A", "B </s>")]
    talk = [t for d in made for c in d.chunks for t, by_format in c.pieces if not by_format]
    assert {"S", "u<|im_end|>", "A", "B </s>"} <= set(talk)
    assert len(made) == (2 if name == "last_only" else 1)


def test_thoughts_calls_and_tools_in_a_switched_template():
    tool = {"name": "look", "parameters": {"type": "object", "properties": {"q": {"type": "string", "description": "a <|im_end|> b"}}}}
    call = {"tool_calls": [{"name": "look", "arguments": {"q": "<|im_end|>x"}}], "reasoning_content": "hm"}
    chat = chat_of(("user", "u"), ("assistant", "", call), ("tool", "r"), ("assistant", "A", {"reasoning_content": "so"}), ("user", "v"), ("assistant", "B"), tools=[tool])
    first, second = BUILT["switched"].drafts(chat)
    trained = [[c.text for c, on in zip(d.chunks, d.trained) if on] for d in (first, second)]
    assert trained == [['hm\n</think>\n<tool_call>look({"q": "<|im_end|>x"})</tool_call><|im_end|>\n', "so\n</think>\nA<|im_end|>\n"], ["B<|im_end|>\n"]]
    ids = encode_drafts([first], TOKENIZER).input_ids.tolist()
    assert ids.count(TOKENIZER.im_end_id) == 5
    assert [c.role for c in first.chunks] == ["system", "user", "assistant", "assistant", "tool", "assistant", "assistant"]
    assert "so" not in "".join(c.text for c in second.chunks) and BUILT["switched"].loses(chat) == ()


def test_a_thought_that_is_printed_for_the_last_message_only_is_not_trained_away():
    text = CHATML.replace("{{ m.content }}", "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}")
    step = ("assistant", "", {"reasoning_content": "r", "tool_calls": [{"name": "f", "arguments": {}}]})
    template = chat_template(text)
    assert len(template.drafts(chat_of(("user", "u"), ("assistant", "A", {"reasoning_content": "r"})))) == 1
    with pytest.raises(BadRecord, match="message 1: what it says or thinks"):
        template.drafts(chat_of(("user", "u"), step, ("tool", "t"), ("assistant", "A", {"reasoning_content": "r"})))


def test_a_template_that_looks_into_a_text_is_not_believed_with_marks():
    looks = chat_template(CHATML.replace("{{ m.content }}", "{{ 'loud ' if m.content.startswith('!') else '' }}{{ m.content }}"))
    with pytest.raises(BadRecord, match="cannot be followed"):
        looks.drafts(chat_of(("user", "!<b>"), ("assistant", "A")))
    (draft,) = looks.drafts(chat_of(("user", "!b"), ("assistant", "A")))
    assert draft.chunks[0].text == "<|im_start|>user\nloud !b<|im_end|>\n"


def test_a_turn_that_does_not_begin_as_its_prompt_ends_is_refused():
    text = CHATML.replace("{{ m.content }}", "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}")
    broken = chat_template(text.replace("assistant\n{% endif %}", "assistant\n{{ '<think>\n' if enable_thinking else '' }}{% endif %}"))
    assert broken.drafts(chat_of(("user", "u"), ("assistant", "A")))
    with pytest.raises(BadRecord, match="the prompt of inference is not the beginning"):
        broken.drafts(chat_of(("user", "u"), ("assistant", "A", {"reasoning_content": "r"})))


def test_switches_for_one_chat():
    chat = chat_of(("user", "u"), ("assistant", "A", {"reasoning_content": "r"}))
    loud = chat_template("{{ style }}{{ chat_template_kwargs.style }}|" + CHATML)
    assert loud.drafts(chat, style="x")[0].chunks[0].text.startswith("xx|<|im_start|>user")
    assert "".join(c.text for c in NANO3.drafts(chat, truncate_history_thinking=False)[0].chunks) == render(chat.messages)


def test_what_a_template_leaves_out_is_said():
    chat = chat_of(("system", "s"), ("user", "u"), ("assistant", "A", {"reasoning_content": "r", "tool_calls": [{"name": "f", "arguments": {}}]}), ("tool", "t"), tools=[{"name": "f"}])
    assert BUILT["chatml"].loses(chat) == ("calls", "thoughts", "tools")
    assert BUILT["headers"].loses(chat) == ("thoughts", "tools") and NANO3.loses(chat) == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{% for m in messages %}<{{ m.role }}>{{ m.content | reverse }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}", "template_not_traceable"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}", "template_not_traceable"),
        ("{% if messages | length > 1 %}{{ raise_exception('too long') }}{% endif %}x", "template_refused"),
        ("{% for m in messages %}\n{{ m.content + 1 }}{% endfor %}", "template_error"),
        ("{% if messages[0].content == 'u <b>' %}{{ 'x' * 9999999999 }}{% endif %}", "template_limit"),
        ("{% include 'x' %}", "template_error"),
    ],
)
def test_chats_that_cannot_be_prepared_are_refused_with_a_reason(text, reason):
    chat = chat_of(("user", "u <b>"), ("assistant", "A"))
    with pytest.raises(BadRecord) as error:
        chat_template(text).drafts(chat)
    assert error.value.reason == reason and "inline template" in error.value.what and error.value.fix


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='ha') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
        "{% set n = namespace(x='ha') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
        "{% set n = namespace(x='ha') %}{% for i in range(99) %}{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(20) }}",
        "{{ 'x' * 9999999999 }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ 'x'.ljust(9999999999) }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ ('x' * 9999999).replace('x', 'y' * 999) }}",
        "{{ 9 ** 999999999 }}",
    ],
)
def test_a_template_without_end_is_an_error_before_the_first_chat(text):
    with pytest.raises(UserError, match="steps|characters"):
        chat_template(text)


def test_an_error_names_the_line_of_the_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text("first line\nsecond {{ 1 + none }}")
    with pytest.raises(BadRecord, match="mine.jinja, line 2: TypeError"):
        chat_template(str(path)).drafts(chat_of(("user", "u"), ("assistant", "A")))
    with pytest.raises(UserError, match="line 3"):
        chat_template("{{ a }}\n\n{% for %}")


@pytest.mark.parametrize("text", ["{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}", "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__ }}", "{{ (messages | attr('__class__')) }}", "{{ raise_exception.__globals__ }}"])
def test_attributes_out_of_bounds_are_an_error_and_not_nothing(text):
    with pytest.raises(UserError) as error:
        chat_template(text)
    assert not isinstance(error.value, BadRecord) and "reaches for the attribute" in str(error.value)


def test_templates_by_name(tmp_path):
    with pytest.raises(UserError, match="did you mean 'nano3'"):
        chat_template("nano")
    for spec in ("You are helpful.", "", "super3", "no/such/file", "missing.jinja"):
        with pytest.raises(UserError):
            chat_template(spec)
    assert chat_template(str(template_path("nano3"))).native and not chat_template(CHATML).native
    (tmp_path / "mine.jinja").write_text(CHATML)
    assert chat_template(str(tmp_path / "mine.jinja")).digest == chat_template(CHATML).digest != NANO3.digest
    with pytest.raises(UserError, match="did you mean 'mine.jinja'"):
        chat_template(str(tmp_path / "mime.jinja"))
    assert pickle.loads(pickle.dumps(BUILT["chatml"])) == BUILT["chatml"]


def test_templates_of_a_tokenizer(tmp_path):
    with pytest.raises(UserError, match="no folder"):
        chat_template("tokenizer")
    with pytest.raises(UserError, match="no chat template 'default'"):
        chat_template("tokenizer", tmp_path)
    named = [{"name": "default", "template": HEADERS}, {"name": "tool_use", "template": SWITCHED}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<bos>"}, "chat_template": named}))
    template = chat_template("tokenizer", tmp_path)
    assert template.text == HEADERS and template.digest != chat_template(HEADERS).digest
    assert template.render([{"role": "user", "content": "u"}]).startswith("<bos><|start_header_id|>user")
    assert chat_template("tokenizer:tool_use", tmp_path).text == SWITCHED
    with pytest.raises(UserError, match="did you mean 'tool_use'"):
        chat_template("tokenizer:tool_us", tmp_path)
    (tmp_path / "chat_template.jinja").write_text(CHATML)
    assert chat_template("tokenizer", tmp_path).text == CHATML


def test_the_date_is_told_once_and_counts():
    ask = "{{ strftime_now('%d %b %Y') }}" + CHATML
    one, other = (chat_template(ask, date=d) for d in ("2026-01-31", "2026-02-01"))
    assert one.render([]).startswith("31 Jan 2026") and one.digest != other.digest and chat_template(CHATML, date="2026-01-31").date == ""


def test_private_use_letters_in_a_chat_do_not_confuse_the_marks():
    for letters in ("\U00100001", "\U000f0001", "\U00100001\U000f0001"):
        chat = chat_of(("user", f"u{letters}"), ("assistant", "A"))
        (draft,) = BUILT["chatml"].drafts(chat)
        assert [c.text for c, on in zip(draft.chunks, draft.trained) if on] == ["A<|im_end|>\n"]
    (draft,) = BUILT["chatml"].drafts(chat_of(("user", "<|im_end|>\U00100001"), ("assistant", "A")))
    assert draft.chunks[0].pieces[1] == ("<|im_end|>\U00100001", False)
    with pytest.raises(BadRecord, match="cannot be followed"):
        BUILT["chatml"].drafts(chat_of(("user", "<|im_end|>\U00100001\U000f0001"), ("assistant", "A")))


def test_a_plan_without_thoughts_is_cut_at_each_turn_only_when_asked():
    chat = chat_of(("user", "u"), ("assistant", "A"), ("user", "v"), ("assistant", "B"))
    assert len(sequence_plans(chat)) == 1 and [(p.end, p.first) for p in sequence_plans(chat, each_turn=True)] == [(2, 1), (4, 3)]
