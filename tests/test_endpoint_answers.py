"""What a server says beside the words: thoughts, calls, counts; samples, costs, order, and connections that are kept."""

import copy
import dataclasses
import json
import pickle
import select
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron_nb.connection import Connections, post
from nemotron_nb.core import UserError, digest
from nemotron_nb.data.judge import endpoint_judge
from nemotron_nb.data.levels import BadRecord
from nemotron_nb.data.records import Reject, parse_conversation
from nemotron_nb.endpoint import Answer, Endpoint, EndpointError, Reply, Request, Usage, ask, ask_all, ask_each, rehearsal
from nemotron_nb.generate.synthesise import synthesise
from nemotron_nb.usage import Tokens, read_ledger, read_tokens

ASKED = [{"role": "user", "content": "2+2?"}]
SHAPE = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
COUNTED = {"prompt_tokens": 7, "completion_tokens": 9, "completion_tokens_details": {"reasoning_tokens": 5}, "prompt_tokens_details": {"cached_tokens": 3}}


def endpoint(server, **more):
    return Endpoint(server.url, "m", **{"backoff": 0.0, "timeout": 5.0, "retries": 0, "sleep": lambda s: None, **more})


def answered(reply, request=None, **more):
    """The answer to one reply, and the requests it took."""
    with rehearsal(lambda body, before: reply) as server:
        request = request or {}
        return ask(endpoint(server, **more), ASKED, **request), len(server.requests)


def failed(reply, request=None, **more):
    with pytest.raises(EndpointError) as error, rehearsal(lambda body, before: reply) as server:
        ask(endpoint(server, **more), ASKED, **(request or {}))
    return error.value.kind, len(server.requests)


@pytest.mark.parametrize("reply", [Reply("4", reasoning="two and two"), Reply("4", reasoning="two and two", reasoning_name="reasoning"), Reply("<think>\ntwo and two\n</think>\n4"), Reply("two and two</think>4"), Reply("<think>two and two</think>4", reasoning="two and two\n")])
def test_a_thought_is_kept_however_it_is_sent(reply, tmp_path):
    answer, _ = answered(reply)
    assert (answer.text, answer.reasoning) == ("4", "two and two")
    with rehearsal(lambda body, before: reply) as server:
        asked = endpoint(server, cache_dir=str(tmp_path))
        first, again = (ask(asked, ASKED) for _ in range(2))
        assert again == dataclasses.replace(first, attempts=0) and len(server.requests) == 1


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "<", "{"]), max_size=7).map("".join))
def test_a_thought_is_cut_out_where_the_records_cut_it(text):
    from nemotron_nb.endpoint import _apart

    try:
        message = parse_conversation({"messages": [*ASKED, {"role": "assistant", "content": text}]}).messages[1]
    except BadRecord:
        return
    said, thought = _apart(text)
    assert said == message["content"] and thought.strip("\n ") == message.get("reasoning_content", "").strip("\n ")


def test_a_call_is_an_answer_and_says_nothing(tmp_path):
    reply = Reply(None, tool_calls=[CALL], finish_reason="tool_calls", reasoning="let me add")
    with rehearsal(lambda body, before: reply) as server:
        asked = endpoint(server, cache_dir=str(tmp_path))
        first, again = (ask(asked, ASKED, SHAPE, tools=[TOOL]) for _ in range(2))
    assert first == Answer("", None, 1, "tool_calls", "let me add", (CALL,)) and again == dataclasses.replace(first, attempts=0)
    assert server.requests == [server.requests[0]] and server.requests[0]["tools"] == [TOOL]
    as_object = {**CALL, "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    assert answered(Reply(None, tool_calls=[as_object]))[0].tool_calls == (CALL,)
    assert failed(Reply(None, tool_calls=[CALL]), {"schema": SHAPE}) == ("invalid", 1)  # nobody offered a tool


@pytest.mark.parametrize("reply", [Reply(None), Reply(None, reasoning="hm"), Reply("", reasoning="hm"), Reply(["4"]), Reply(4), Reply("<think>hm"), Reply("<think>a</think>4", reasoning="b"), Reply("4", reasoning=3), Reply(None, tool_calls=[{"function": {"name": 5, "arguments": "{}"}}]), Reply(None, tool_calls=[{"name": "add"}]), Reply(None, tool_calls=["add"]), Reply(float("nan"))])
def test_what_is_no_answer_is_invalid(reply):
    assert failed(reply) == ("invalid", 1)


@pytest.mark.parametrize("raw", [b"<html>busy</html>", b'{"choices": []}', b'{"choices": {}}', b'{"choices": null}', b"[]", b"null", b"", b"\xff\xfe", b'{"choices": [{"message": "4"}]}', b'{"choices": [{"message": {"content": "4"', b'{"choices": [{"message": {"content": NaN}}]}', b"[" * 100_000])
def test_bodies_that_are_no_reply_are_invalid(raw):
    assert failed(Reply(raw=raw)) == ("invalid", 1)


def test_seventeen_megabytes_are_too_many_and_the_next_answer_is_read():
    replies = iter([Reply("x" * (17 << 20)), Reply("4")])
    with rehearsal(lambda body, before: next(replies)) as server:
        asked = endpoint(server, retries=3)
        with pytest.raises(EndpointError, match="longer than") as error:
            ask(asked, ASKED)
        assert error.value.kind == "invalid" and ask(asked, ASKED).text == "4" and len(server.requests) == 2


def test_an_answer_that_was_cut_is_its_own_error_and_is_asked_for_once(tmp_path):
    text, thought, calls = Reply("4 beca", finish_reason="length"), Reply(None, reasoning="hm", finish_reason="length"), Reply(None, tool_calls=[CALL], finish_reason="length")
    for reply in (text, thought, calls, Reply("<think>hm", finish_reason="length")):
        assert failed(reply, retries=3) == ("cut", 1)
        assert answered(reply, {"allow_cut": True})[0].finish_reason == "length"
    assert failed(thought, {"schema": SHAPE}, retries=3) == ("cut", 1)
    assert failed(Reply('{"n":', finish_reason="length"), {"schema": SHAPE}, retries=1) == ("invalid", 2)
    assert answered(Reply('{"n": 4}', finish_reason="length"), {"schema": SHAPE})[0].value == {"n": 4}
    with rehearsal(lambda body, before: text) as server:  # what was kept while it was allowed is not taken where it is not
        asked = endpoint(server, cache_dir=str(tmp_path))
        assert ask(asked, ASKED, allow_cut=True).text == "4 beca" and ask(asked, ASKED, allow_cut=True).attempts == 0
        with pytest.raises(EndpointError):
            ask(asked, ASKED)


def test_what_the_servers_filter_stopped_is_refused_once():
    assert failed(Reply("I ca", finish_reason="content_filter"), retries=3) == ("refused", 1)


def test_a_judge_and_a_writer_know_what_cut_means():
    chat = parse_conversation({"messages": [*ASKED, {"role": "assistant", "content": "4"}]})
    with rehearsal(lambda body, before: Reply(None, reasoning="hm", finish_reason="length")) as server:
        [verdict] = endpoint_judge(endpoint(server), unusable="reject")([chat])
        assert not verdict.consistent and "did not fit" in verdict.why
        with pytest.raises(EndpointError):
            list(endpoint_judge(endpoint(server))([chat]))
        usage = Usage()
        [made] = synthesise([{"x": 1}], "{{ x }}", SHAPE, endpoint(server), usage=usage)
        assert isinstance(made, Reject) and made.reason == "invalid_answer" and usage.totals()["stages"]["synthesis"]["failed"] == {"cut": 1}


def test_samples_are_questions_of_their_own(tmp_path):
    with rehearsal(lambda body, before: f"seed {body.get('seed')}, {before}") as server:
        asked = endpoint(server, cache_dir=str(tmp_path), options={"temperature": 1.0})
        requests = [Request(ASKED, sample=k) for k in range(4)]
        first, again = ([a.text for a in ask_all(asked, requests)] for _ in range(2))
        assert first == again == ["seed None, 0", "seed 1, 0", "seed 2, 0", "seed 3, 0"] and len(server.requests) == 4
        plain = dataclasses.replace(asked, sample_seed=False)
        assert [a.text for a in ask_all(plain, requests[1:3])] != first[1:3] and "seed" not in server.requests[-1]
        assert ask(dataclasses.replace(asked, options={"temperature": 1.0, "seed": 10}), ASKED, sample=2).text == "seed 12, 0"


def test_answers_kept_before_there_were_samples_are_found(tmp_path):
    with rehearsal(lambda body, before: "new") as server:
        asked = endpoint(server, cache_dir=str(tmp_path), options={"temperature": 1.0})
        question = {"model": "m", "messages": ASKED, "temperature": 1.0}
        name = digest({"url": server.url, "question": question, "schema": None}, 40)
        (tmp_path / name[:2]).mkdir()
        (tmp_path / name[:2] / f"{name}.json").write_text(json.dumps({"text": "<think>hm</think>old", "finish_reason": "stop"}))
        assert ask(asked, ASKED) == Answer("old", None, 0, "stop", "hm") and ask(asked, ASKED, sample=1).text == "new"


@pytest.mark.parametrize("sample", [-1, 1.0, "1", True])
def test_a_sample_is_a_number_and_has_no_use_at_temperature_0(sample):
    with rehearsal(lambda body, before: "x") as server:
        for wrong, options in ((sample, {"temperature": 1}), (1, {"temperature": 0}), (1, {"temperature": 0.0})):
            with pytest.raises(UserError, match="sample"):
                ask(endpoint(server, options=options), ASKED, sample=wrong)
    assert server.requests == []


def test_every_request_stands_in_the_ledger(tmp_path):
    replies = iter([Reply(status=500), Reply("no", usage=COUNTED, model="m-1"), Reply('{"n": 1}', usage=COUNTED, model="m-2"), Reply('{"n": 2}', model="m-2")])
    with rehearsal(lambda body, before: next(replies)) as server:
        usage = Usage(tmp_path / "ledger.jsonl")
        asked = endpoint(server, retries=3, price_in=1.0, price_out=10.0, cache_dir=str(tmp_path / "kept"), options={"temperature": 1})
        answer = ask(asked, ASKED, SHAPE, usage=usage, stage="solve", row="7")
        assert ask(asked, ASKED, SHAPE, usage=usage, stage="solve", row="7").attempts == 0
        ask(asked, ASKED, SHAPE, usage=usage, stage="again", row="7", sample=1)
    assert (answer.model, answer.tokens) == ("m-2", Tokens(7, 9, 5, 3))
    lines = list(read_ledger(tmp_path / "ledger.jsonl"))
    assert [(e["stage"], e["attempt"], e["failure"], e["model"], e["tokens_given"], e["tokens_written"], e["tokens_thought"], e["tokens_cached"], e["price"], e["sample"]) for e in lines] == [
        ("solve", 1, "unavailable", "", None, None, None, None, None, 0),
        ("solve", 2, "invalid", "m-1", 7, 9, 5, 3, 97 / 1e6, 0),
        ("solve", 3, "", "m-2", 7, 9, 5, 3, 97 / 1e6, 0),
        ("again", 1, "", "m-2", None, None, None, None, None, 1),
    ]
    assert {e["prompt"] for e in lines} == {Request(ASKED).prompt} and all(e["row"] == "7" and e["seconds"] >= 0 for e in lines)
    totals = usage.totals()
    assert (totals["requests"], totals["answers"], totals["failed"], totals["without_tokens"], totals["without_price"], totals["from_disk"]) == (4, 2, {"unavailable": 1, "invalid": 1}, 2, 2, 1)
    assert totals["price"] == pytest.approx(2 * 97 / 1e6) and totals["models"] == {"m-1": 1, "m-2": 2} and totals["model_changes"] == 1
    again = Usage(tmp_path / "ledger.jsonl")
    assert {k: v for k, v in again.totals().items() if k != "from_disk"} == {k: v for k, v in totals.items() if k != "from_disk"}


@pytest.mark.parametrize("usage", [None, [], "7", {}, {"prompt_tokens": 7}, {"prompt_tokens": 7, "completion_tokens": None}, {"prompt_tokens": True, "completion_tokens": 1}, {"prompt_tokens": 7.5, "completion_tokens": 1}, {"prompt_tokens": -7, "completion_tokens": 1}])
def test_counts_that_are_none_are_not_guessed(usage):
    assert read_tokens(usage) is None
    answer, _ = answered(Reply(raw=json.dumps({"choices": [{"message": {"content": "4"}}], "usage": usage, "model": 5}).encode()))
    assert answer == Answer("4")


def test_many_threads_write_whole_lines(tmp_path):
    with rehearsal(lambda body, before: Reply("x", usage=COUNTED)) as server:
        usage = Usage(tmp_path / "ledger.jsonl")
        answers = list(ask_all(endpoint(server, concurrency=16), (Request([{"role": "user", "content": str(i)}], row=str(i)) for i in range(200)), usage))
    assert len(answers) == 200 and sorted(int(e["row"]) for e in read_ledger(tmp_path / "ledger.jsonl")) == list(range(200))
    assert usage.totals()["tokens_given"] == 1400


@pytest.mark.parametrize("keep", [0, 1, 40])
def test_a_ledger_goes_on_after_a_kill_at_any_byte(tmp_path, keep):
    path = tmp_path / "ledger.jsonl"
    with rehearsal(lambda body, before: Reply("x", usage=COUNTED)) as server:
        for _ in range(2):
            ask(endpoint(server), ASKED, usage=Usage(path))
        whole = path.read_bytes()
        first = whole.index(b"\n") + 1
        path.write_bytes(whole[: first + keep])
        usage = Usage(path)
        assert usage.torn == keep and usage.totals()["requests"] == 1
        ask(endpoint(server), ASKED, usage=usage)
    assert usage.totals()["requests"] == len(list(read_ledger(path))) == 2
    path.write_bytes(b"{}\n" + whole)
    with pytest.raises(UserError, match="line 1"):
        Usage(path)


def test_a_ledger_that_cannot_be_written_stops_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    with rehearsal(lambda body, before: "x") as server, pytest.raises(UserError, match="ledger"):
        ask(endpoint(server), ASKED, usage=Usage(tmp_path / "file" / "ledger.jsonl"))


def numbers(count):
    return (Request([{"role": "user", "content": str(i)}]) for i in range(count))


def test_answers_come_as_they_are_done_and_one_that_is_slow_stops_nobody():
    """The first answer is held back until all the others are read: with a window in order that would never end."""
    release = threading.Event()

    def answer(body, before):
        number = body["messages"][0]["content"]
        if number == "0":
            assert release.wait(30)
        return Reply(status=400) if number == "5" else number

    with rehearsal(answer) as server:
        came = {}
        for number, found in ask_each(endpoint(server, concurrency=3), numbers(60)):
            came[number] = found
            if len(came) == 59:
                assert 0 not in came
                release.set()
        assert [came[i].kind if i == 5 else came[i].text for i in range(60)] == [("refused" if i == 5 else str(i)) for i in range(60)]
        assert server.connections == 3


def test_in_order_a_slow_one_is_waited_for_and_the_others_go_on_up_to_a_limit():
    release, drawn = threading.Event(), []

    def answer(body, before):
        if body["messages"][0]["content"] == "0":
            release.wait(30)
        return body["messages"][0]["content"]

    def questions(count):
        for request in numbers(count):
            drawn.append(request)
            if len(drawn) == 50:
                release.set()
            yield request

    with rehearsal(answer) as server:
        assert [a.text for a in ask_all(endpoint(server, concurrency=2), questions(60))] == [str(i) for i in range(60)]
        release.clear()
        drawn.clear()
        answers = ask_all(endpoint(server, concurrency=2), questions(49), ahead=5)
        threading.Timer(0.3, release.set).start()
        assert next(answers).text == "0" and 6 <= len(drawn) <= 5 + 4 + 1
        assert len(list(answers)) == 48
    with pytest.raises(UserError, match="ahead"):
        next(ask_all(endpoint(server), [], ahead=0))


def test_equal_questions_of_one_sample_are_asked_once_also_as_they_come(tmp_path):
    with rehearsal(lambda body, before: Reply("x", delay=0.05)) as server:
        asked = endpoint(server, cache_dir=str(tmp_path), options={"temperature": 1})
        found = list(ask_each(asked, [Request(ASKED, sample=i % 2) for i in range(12)]))
        assert sorted(i for i, _ in found) == list(range(12)) and len(server.requests) == 2


def test_a_broken_question_stops_all_with_its_own_error():
    with rehearsal(lambda body, before: "x") as server, pytest.raises(UserError, match="no schema"):
        list(ask_all(endpoint(server), [Request(ASKED), Request(ASKED, None, [lambda v: None])]))


def test_a_connection_is_kept_and_one_that_was_closed_costs_no_attempt():
    with rehearsal(lambda body, before: Reply("x", hang_up=before % 3 == 2)) as server:
        asked = endpoint(server)
        assert [ask(asked, ASKED).attempts for _ in range(12)] == [1] * 12
        assert server.connections == 4 and len(server.requests) == 12
        with rehearsal(lambda body, before: "y") as other:
            assert ask(dataclasses.replace(asked, base_url=other.url), ASKED).text == "y"
        assert ask(asked, ASKED).text == "x"


def raw_server(lines, answers):
    """A server that says exactly these bytes, one answer a request; None hangs up on the request."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        for said in lines:
            line, _ = listener.accept()
            for answer in said:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += line.recv(65536)
                answers.append(head)
                if answer is None:
                    break
                line.sendall(answer)
            line.close()
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


def test_a_server_that_hangs_up_as_the_request_arrives_is_asked_again_over_a_new_connection():
    seen = []
    url = raw_server([[GOOD, None], [GOOD]], seen)
    lines = Connections()
    assert [post(lines, url, b"", {}, 5.0, 99).data for _ in range(2)] == [b"hi", b"hi"]
    assert (lines.opened, lines.resent, len(seen)) == (2, 1, 3)
    fresh = raw_server([[None]], seen)
    with pytest.raises(ConnectionError):  # nothing was kept there: that is a failure of the server
        post(lines, fresh, b"", {}, 5.0, 99)
    lines.close()


def test_a_connection_that_was_closed_while_it_waited_is_not_used():
    url = raw_server([[GOOD], [GOOD]], [])
    lines = Connections()
    post(lines, url, b"", {}, 5.0, 99)
    [[kept]] = lines._lines.values()
    assert select.select([kept.sock], [], [], 10)[0]  # the end of the connection has arrived
    post(lines, url, b"", {}, 5.0, 99)
    assert (lines.opened, lines.resent) == (2, 0)
    lines.close()


@pytest.mark.parametrize(("said", "data"), [(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n", b"hi"), (b"HTTP/1.0 200 OK\r\n\r\nhi", b"hi"), (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", b"hi"), (b"HTTP/1.1 503 No\r\nContent-Length: 9000\r\n\r\n" + b"x" * 9000, b"x" * 2000)])
def test_other_ways_to_end_an_answer(said, data):
    url = raw_server([[said], [said]], [])
    lines = Connections()
    assert [post(lines, url, b"", {}, 5.0, 99).data for _ in range(2)] == [data, data]
    lines.close()


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhi", b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 500 + b"\r\n"])
def test_a_server_that_dies_in_the_middle_is_unavailable(said):
    url = raw_server([[said]], [])
    with pytest.raises(EndpointError, match="broke off") as error:
        ask(Endpoint(url, "m", retries=0, timeout=5.0), ASKED)
    assert error.value.kind == "unavailable"


def test_an_answer_that_drips_is_late_all_the_same():
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        line, _ = listener.accept()
        line.recv(65536)
        line.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9000\r\n\r\n")
        try:
            for _ in range(400):
                line.sendall(b"x")
                time.sleep(0.02)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        post(Connections(), f"http://127.0.0.1:{listener.getsockname()[1]}/", b"", {}, 0.2, 99999)
    assert time.monotonic() - begun < 4  # the drip would take 8 s
    listener.close()


def test_a_proxy_is_asked_for_other_machines_and_told_its_login(monkeypatch):
    seen = []
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"http": raw_server([[GOOD]], seen).replace("http://", "http://me:pass@").removesuffix("/v1")})
    monkeypatch.setattr("urllib.request.proxy_bypass", lambda host: False)
    assert post(Connections(), "http://far.example/v1?a=1", b"", {}, 5.0, 99).data == b"hi"
    assert seen[0].startswith(b"POST http://far.example/v1?a=1 HTTP/1.1\r\nHost: far.example\r\n") and b"Proxy-Authorization: Basic bWU6cGFzcw==" in seen[0]


def test_an_endpoint_can_be_copied_and_sent_and_its_connections_stay_here():
    with rehearsal(lambda body, before: "x") as server:
        asked = Endpoint(server.url, "m")
        ask(asked, ASKED)
        for other in (copy.deepcopy(asked), pickle.loads(pickle.dumps(asked)), dataclasses.replace(asked)):
            assert other == asked and other.connections is not asked.connections and ask(other, ASKED).text == "x"
        assert "connections" not in dataclasses.asdict(asked) and server.connections == 4
