"""A template runs in a process with limits: each hostile form ends in words, the next render works, and nobody shares a child."""

import os
import threading
import time

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.data.jinja_template import chat_template
from nemotron_nb.data.records import BadRecord, parse_conversation
from nemotron_nb.data.sandbox import Failure, Limits, TemplateProcess, render_apart, render_here

STRICT = Limits(seconds=1, memory=2**28, patience=60)
NESTED = "{% set n = namespace(x=['ab']) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
HOSTILE = {
    "slice": "{{ [1] | slice(10**9) | list }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "lipsum": "{{ lipsum(n=10**8) }}",
    "wordwrap": "{{ ('a b ' * 9999999) | wordwrap(1) | wordwrap(1, wrapstring='x' * 9999) }}",
    "translate": "{{ ('x' * 9999999).translate({120: 'y' * 9999}) }}",
    "round": "{{ (10 ** 60) | round(-(10 ** 9)) }}",
    "round up": "{{ 1 | round(10 ** 9, 'ceil') }}",
    "nested, printed": NESTED + "{{ n.x }}",
    "nested, as JSON": NESTED + "{{ n.x | tojson }}",
    "nested, compared": NESTED + "{% set a = n.x %}{% set n.x = ['ab'] %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ a == n.x }}",
    "squaring": "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "join": "{{ (['x' * 60000000] * 100) | join('y' * 60000000) }}",
    "method join": "{{ ('y' * 60000000).join(['x'] * 1000) }}",
    "format": "{{ '{:>4000000000}'.format(1) }}",
    "format of a format": "{{ '{:{}}'.format(1, 4000000000) }}",
    "percent": "{{ '%*d' | format(4000000000, 1) }}",
    "percent operator": "{{ '%*d' % (4000000000, 1) }}",
    "many percents": "{{ ('%60000000d' * 99) % ((1,) * 99) }}",
    "range": "{{ range(10**5) | map('string') | list | join | list | sort | list | unique | list | length }}{{ (('x' * 60000000) | list) * 99 }}",
    "indent": "{{ ('a\n' * 999999) | indent(width='x' * 999999) }}",
    "urlize": "{{ ('http://x.y ' * 5000000) | urlize }}",
    "parentheses": "{{ " + "(" * 20000 + "1" + ")" * 20000 + " }}",
    "lists": "{{ " + "[" * 20000 + "]" * 20000 + " }}",
    "not": "{{ " + "not " * 20000 + "1 }}",
    "ifs": "{% if 1 %}" * 20000 + "{% endif %}" * 20000,
    "folded": "{{ ['x' * 60000000, 'x' * 60000000] | join('y' * 60000000) | list | string | list | string | length }}",
    "calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_each_hostile_form_ends_within_seconds_in_words(text):
    process, begun = TemplateProcess("hostile.jinja", text, "", STRICT), time.monotonic()
    with pytest.raises(Failure) as failure:
        process.render({"messages": []})
    assert failure.value.kind in ("limit", "error", "syntax") and len(str(failure.value)) > 20
    assert time.monotonic() - begun < STRICT.patience


def test_a_hostile_template_is_an_error_of_the_recipe_and_a_hostile_chat_a_bad_row():
    with pytest.raises(UserError, match="memory|processor time") as error:
        chat_template(HOSTILE["many percents"])
    assert not isinstance(error.value, BadRecord) and "inline template" in str(error.value)
    with pytest.raises(UserError, match="too deeply|nested") as error:
        chat_template(HOSTILE["parentheses"])
    assert not isinstance(error.value, BadRecord)
    template = chat_template("{% for m in messages %}[{{ m.role }}]{{ '{:>{}}'.format('', m.content | int * 10**9) }}{{ m.content }}.{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}")
    chats = [parse_conversation({"messages": [{"role": "user", "content": n}, {"role": "assistant", "content": "0"}]}) for n in ("0", "4", "0")]
    assert template.drafts(chats[0]) == template.drafts(chats[2])
    with pytest.raises(BadRecord) as error:
        template.drafts(chats[1])
    assert error.value.reason == "template_limit"
    assert len(template.drafts(chats[2])) == 1


def test_both_ways_print_the_same_and_fail_the_same():
    variables = {"messages": [{"role": "user", "content": "é\ud800\U0001f600\0", "n": 2**70, "x": (1, None, float("inf"))}]}
    text = "{% for m in messages %}{{ m.content }}|{{ m }}{% endfor %}"
    assert render_apart("a", text, "", variables) == render_here("a", text, "", variables)
    assert render_apart("a", "{{ strftime_now('%d') }}", "2026-01-31", {}) == "31"
    for broken in ("\n{{ 1 + none }}", "{{ ''.__class__ }}", "{{ raise_exception('no') }}", "{% for %}", "{{ 'x' * 9999999999 }}", "{% include 'x' %}"):
        found = []
        for render in (render_here, render_apart):
            with pytest.raises(Failure) as failure:
                render("a", broken, "", variables)
            found.append((failure.value.kind, failure.value.line, str(failure.value)))
        assert found[0] == found[1]


def test_one_child_serves_all_renders_and_has_none_of_our_keys(monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    process = TemplateProcess("a", "{{ x }}")
    assert [process.render({"x": n}) for n in range(5)] == list("01234")
    (child,) = process._children
    assert b"secret" not in open(f"/proc/{child.pid}/environ", "rb").read() if os.path.exists("/proc/self/environ") else True
    child.kill()
    with pytest.raises(Failure, match="signal 9"):
        process.render({"x": 1})
    assert process.render({"x": 1}) == "1" and process._children != [child]
    last = process._children[0]
    del process
    assert last.wait(timeout=10) is not None, "the child ends with its handle"


def test_an_interrupted_exchange_is_not_taken_up():
    process = TemplateProcess("a", "{{ x }}{% for i in range(x) %}{{ [i] | string | list | length }}{% endfor %}")
    process.render({"x": 1})

    class Stop(BaseException):
        pass

    kept = process._exchange

    def interrupted(variables):
        process._children[-1].stdin.write(b"")
        raise Stop

    process._exchange = interrupted
    with pytest.raises(Stop):
        process.render({"x": 2})
    process._exchange = kept
    assert process.render({"x": 0}) == "0"


def test_threads_and_forks_get_their_own_answers():
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: [render_apart("a", "{{ x }}", "", {"x": n}) for _ in range(20)]})) for n in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(set(answers) == {str(n)} for n, answers in found.items()) and len(found) == 4
    readers = []
    for n in range(2):
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            said = "".join(render_apart("a", "{{ x }}", "", {"x": n}) for _ in range(50))
            os.write(write, said.encode())
            os._exit(0)
        os.close(write)
        readers.append((n, pid, read))
    assert render_apart("a", "{{ x }}", "", {"x": 7}) == "7"
    for n, pid, read in readers:
        assert os.read(read, 1000).decode() == str(n) * 50 and os.waitpid(pid, 0)[1] == 0
    assert render_apart("a", "{{ x }}", "", {"x": 7}) == "7"
