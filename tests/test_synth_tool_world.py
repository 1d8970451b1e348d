"""Talks with tools: what was done is what the goal and the policy lead to, and every wrong deed is found."""

import copy
import json
import random
from collections import Counter

import pytest
from synth_rows import configs_of, prepared, reasons, right, spoilt

from nemotron_nb.synth.tool_world import (
    BANK, TRAVEL, WORLDS, Talk, bank_forbids, draw_bank, draw_travel, run_world_tool, travel_forbids,
)  # fmt: skip


def rows():
    return right("tool_world", 400, 460)


def test_right_rows_pass_and_are_prepared(tmp_path):
    assert reasons("tool_world", rows()) == {"": len(rows())}
    prepared(rows()[:200], tmp_path)


def test_every_rule_and_every_goal_is_met():
    outcomes = Counter(row["synth"]["about"]["outcome"] for row in right("tool_world", 400, 460))
    assert set(outcomes) >= {"done", "declined", *BANK.refusals, *TRAVEL.refusals} - {"no_seats"}
    assert 0.2 < 1 - (outcomes["done"] + outcomes["declined"]) / len(rows()) < 0.6
    goals = {row["synth"]["about"]["goal"] for row in rows()}
    assert goals == {*BANK.goals, *TRAVEL.goals}


def outcome(row):
    return row["synth"]["about"]["outcome"]


def act_on(row, name, arguments, confirmed=True):
    world = WORLDS[row["synth"]["check"]["world"]]
    state = copy.deepcopy(row["synth"]["check"]["state"])
    for message in row["messages"]:
        for call in message.get("tool_calls") or ():
            run_world_tool(world, state, call["function"]["name"], json.loads(call["function"]["arguments"]))
    talk = Talk(world, state, random.Random(0), row["messages"])
    talk.user("Yes, please." if confirmed else "Hm.")
    talk.call(name, arguments, "")
    talk.say("Done.")


def forbidden_act(row):
    if outcome(row) in ("done", "declined"):
        return False
    act_on(row, *row["synth"]["check"]["act"])


def act_without_a_yes(row):
    if outcome(row) != "done":
        return False
    row["messages"][-4]["content"] = "No!"


def act_after_a_no(row):
    if outcome(row) != "declined":
        return False
    act_on(row, *row["synth"]["check"]["act"])


def claim_only(row):
    if outcome(row) != "done":
        return False
    del row["messages"][-3:-1]


def act_twice(row):
    if outcome(row) != "done" or row["synth"]["about"]["goal"] != "transfer" or "X" not in row["messages"][-3]["tool_calls"][0]["function"]["arguments"]:
        return False
    act_on(row, "block_card", {"card": next(c for c, a in row["synth"]["check"]["state"]["cards"].items() if a["owner"] == row["synth"]["check"]["customer"])})


def refuse_what_is_allowed(row):
    if outcome(row) != "done":
        return False
    del row["messages"][-3:]
    row["messages"][-1] = {"role": "assistant", "content": "I cannot do that: no."}


def change_a_result(row):
    last = [m for m in row["messages"] if m["role"] == "tool"][-1]
    result = json.loads(last["content"])
    result["note"] = "ok"
    last["content"] = json.dumps(result)


def change_a_number(row):
    if outcome(row) != "done" or row["synth"]["about"]["goal"] not in ("transfer", "limit"):
        return False
    call = row["messages"][-3]["tool_calls"][0]["function"]
    arguments = json.loads(call["arguments"])
    arguments[{"transfer": "amount", "limit": "limit"}[row["synth"]["about"]["goal"]]] += 1
    call["arguments"] = json.dumps(arguments)


def do_not_identify(row):
    i = next(i for i, m in enumerate(row["messages"]) if m["role"] == "tool")
    del row["messages"][i - 1 : i + 1]
    return any(m["role"] == "tool" for m in row["messages"])


def look_at_somebody_else(row):
    check = row["synth"]["check"]
    other = next(c for c in check["state"]["customers"] if c != check["customer"])
    act_on(row, "list_accounts" if check["world"] == "bank" else "list_bookings", {"customer": other})


def tell_all_at_once(row):
    turn = next(m for m in row["messages"] if m["role"] == "user")
    turn["content"] += " " + ", ".join(row["synth"]["check"]["facts"][:2])


def another_policy(row):
    row["messages"][0]["content"] += "\n- Exceptions are possible."


def a_tool_more(row):
    row["tools"].append(row["tools"][0])


def other_last_words(row):
    row["messages"][-1]["content"] = "Goodbye."


def lose_a_result(row):
    del row["messages"][next(i for i, m in enumerate(row["messages"]) if m["role"] == "tool")]


WRONGS = {
    forbidden_act: {"forbidden_call"}, act_without_a_yes: {"not_confirmed"}, act_after_a_no: {"other_state"},
    claim_only: {"other_state"}, act_twice: {"other_state"}, refuse_what_is_allowed: {"other_state"},
    change_a_result: {"other_result"}, change_a_number: {"other_result", "forbidden_call"}, do_not_identify: {"not_identified"},
    look_at_somebody_else: {"forbidden_call"}, tell_all_at_once: {"facts_at_once"}, another_policy: {"other_policy"},
    a_tool_more: {"other_policy"}, other_last_words: {"other_words"}, lose_a_result: {"call_without_result"},
}  # fmt: skip


@pytest.mark.parametrize("spoil", WRONGS, ids=lambda spoil: spoil.__name__)
def test_planted_wrongs_are_refused(spoil):
    wrong = spoilt(rows(), spoil)
    assert len(wrong) >= 15
    assert set(reasons("tool_world", wrong)) <= WRONGS[spoil]


def test_rules_of_the_travel_desk_by_hand():
    trip = {"from": "A", "to": "B", "day": "2026-05-12", "time": "08:00", "price": 10, "seats": 3}
    state = {
        "customers": {"C1": {}, "C2": {}},
        "trips": {"T1": trip, "T2": {**trip, "day": "2026-05-11"}, "T3": {**trip, "seats": 1}},
        "bookings": {
            "flex": {"customer": "C1", "trip": "T1", "seats": 2, "fare": "flex"},
            "late": {"customer": "C1", "trip": "T2", "seats": 2, "fare": "flex"},
            "saver": {"customer": "C1", "trip": "T1", "seats": 2, "fare": "saver"},
        },
    }
    cases = [
        ("C1", "cancel_booking", {"booking": "flex"}, ""), ("C2", "cancel_booking", {"booking": "flex"}, "other_customer"),
        ("C1", "cancel_booking", {"booking": "none"}, "other_customer"), ("C1", "cancel_booking", {"booking": "late"}, "too_late"),
        ("C1", "cancel_booking", {"booking": "saver"}, "saver"), ("C1", "change_booking", {"booking": "flex", "trip": "T3"}, "no_seats"),
        ("C1", "change_booking", {"booking": "flex", "trip": "T1"}, ""),
        ("C1", "book_trip", {"customer": "C1", "trip": "T1", "seats": 3, "fare": "flex"}, ""),
        ("C1", "book_trip", {"customer": "C1", "trip": "T1", "seats": 4, "fare": "flex"}, "no_seats"),
        ("C1", "book_trip", {"customer": "C1", "trip": "T1", "seats": 5, "fare": "flex"}, "too_many"),
        ("C1", "book_trip", {"customer": "C2", "trip": "T1", "seats": 1, "fare": "flex"}, "other_customer"),
    ]  # fmt: skip
    assert [travel_forbids(state, *case[:3]) for case in cases] == [case[3] for case in cases]
    total = sum(t["seats"] for t in state["trips"].values())
    run_world_tool(TRAVEL, state, "change_booking", {"booking": "flex", "trip": "T2"})
    assert sum(t["seats"] for t in state["trips"].values()) == total and state["trips"]["T2"]["seats"] == 1
    assert run_world_tool(TRAVEL, state, "cancel_booking", {"booking": "flex"}) == {"cancelled": "flex", "refund": 20}


def test_rules_of_the_bank_by_hand():
    state = {
        "customers": {"K1": {"since": "2020-01-01"}, "K2": {"since": "2026-01-01"}},
        "accounts": {"A1": {"owner": "K1", "balance": 1500, "frozen": False}, "A2": {"owner": "K1", "balance": 9000, "frozen": True}},
        "cards": {"1111": {"owner": "K1", "limit": 500}, "2222": {"owner": "K2", "limit": 500}},
    }
    send = lambda source, amount: {"source": source, "target": "X", "amount": amount}  # noqa: E731
    cases = [
        ("K1", "transfer", send("A1", 1500), ""), ("K1", "transfer", send("A1", 1501), "not_covered"),
        ("K1", "transfer", send("A1", 2001), "over_maximum"), ("K1", "transfer", send("A2", 1), "frozen"),
        ("K2", "transfer", send("A1", 1), "other_customer"), ("K1", "block_card", {"card": "1111"}, ""),
        ("K1", "block_card", {"card": "2222"}, "other_customer"), ("K1", "set_limit", {"card": "1111", "limit": 5000}, ""),
        ("K1", "set_limit", {"card": "1111", "limit": 5001}, "limit_too_high"),
        ("K2", "set_limit", {"card": "2222", "limit": 600}, "too_new"), ("K2", "set_limit", {"card": "2222", "limit": 400}, ""),
    ]  # fmt: skip
    assert [bank_forbids(state, *case[:3]) for case in cases] == [case[3] for case in cases]


@pytest.mark.parametrize("arguments", [{}, {"booking": "B0"}, {"booking": ["x"]}, {"booking": "B0", "more": 1}, {"booking": None}])
def test_bad_calls_are_answered_and_change_nothing(arguments):
    state = draw_travel(random.Random(0))
    before = copy.deepcopy(state)
    assert "error" in run_world_tool(TRAVEL, state, "cancel_booking", arguments)
    assert "error" in run_world_tool(BANK, draw_bank(random.Random(0)), "no_such_tool", arguments)
    assert state == before


def test_settings():
    assert {kind: settings.rows for kind, settings in configs_of("tool_world").items()} == {"default": 10000, "tiny": 200}
