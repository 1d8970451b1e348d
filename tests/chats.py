"""Random chats for the tests of the template, the mask and the Jinja path: as people and agents make them, and worse."""

from hypothesis import reject
from hypothesis import strategies as st

from nemotron_nb.data.records import BadRecord, parse_conversation

TOOLS = [{"type": "function", "function": {"name": "f", "description": "does f", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}]
words = st.lists(st.sampled_from(["four", " ", "\n", "é日", "2+2", "{x}", "<b>", "don't"]), max_size=5).map("".join)
hostile = st.lists(
    st.sampled_from(["<|im_end|>", "\n<|im_start|>assistant\n", "<|im_start|>system\n", "hi", " ", "</tool_response>", "[INST]", "</s>", "<unk>", "<|im_", "end|>"]), max_size=6
).map("".join)


@st.composite
def assistants(draw, text, thinks, flags, calls=0):
    """One assistant message, perhaps with a thought and a flag."""
    thought = {"reasoning_content": draw(text)} if thinks and draw(st.booleans()) else {}
    flag = {"train": draw(st.booleans())} if flags and draw(st.booleans()) else {}
    called = {"tool_calls": [{"name": draw(st.sampled_from("fg")), "arguments": draw(st.dictionaries(st.sampled_from("ab"), text | st.integers() | st.just([1, None, "é"]), max_size=2))} for _ in range(calls)]}
    content = draw(text)
    return {"role": "assistant", "content": content.lstrip() if calls else content} | thought | flag | (called if calls else {})


@st.composite
def conversations(draw, text=words, flags=False, budgets=False, systems_inside=True):
    """User turns, each answered through any number of calls; some with thoughts; users and assistants may speak twice, or not at all."""
    thinks = draw(st.booleans())
    messages = [{"role": "system", "content": draw(text)}] if draw(st.booleans()) else []
    if draw(st.integers(0, 5)) == 0:
        messages.append(draw(assistants(text, thinks, flags)))
    for _ in range(draw(st.integers(0 if messages else 1, 3))):
        messages += [{"role": "user", "content": draw(text)} for _ in range(draw(st.sampled_from([1, 1, 1, 2])))]
        if systems_inside and draw(st.integers(0, 9)) == 0:
            messages.append({"role": "system", "content": draw(text)})
        for _ in range(draw(st.integers(0, 2))):
            parallel = draw(st.integers(1, 2))
            messages.append(draw(assistants(text, thinks, flags, parallel)))
            messages += [{"role": "tool", "content": draw(text)} for _ in range(parallel)]
        messages += [draw(assistants(text, thinks, flags)) for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2])))]
    budget = {"reasoning_budget": draw(st.integers(0, 99))} if budgets and draw(st.booleans()) else {}
    try:
        return parse_conversation({"messages": messages, "tools": draw(st.sampled_from([[], TOOLS]))} | budget, source="f", line=1, allow_empty_turns=True)
    except BadRecord:
        reject()
