"""Chats to a model that answers, from a program. Run it anywhere: python first_steps.py"""

from pathlib import Path

from nemotron_nb import Conversation, UserError, answer, export, fine_tune, inspect_chat, load_tokenizer, pack, prepare, read_chats

packs = prepare("sample", "output/packs", pack_size=2048)  # chats -> packs, with a ledger of every lost row
print(packs["accepted"], "chats;", packs["splits"]["train"]["trained_tokens"], "trained tokens")

chats = [chat for chat in read_chats(packs["source"]) if isinstance(chat, Conversation)]  # of any file of chats
found = inspect_chat(chats[0], load_tokenizer("tiny"))  # tokens and mask of one
lengths = [len(sequence.input_ids) for sequence in found.sequences]
print(found.statistics().text, pack(lengths, capacity=1024).tolist(), sep="\n")

made = fine_tune("sample", settings={"train.train_iters": 3})  # the run of: nemotron nano3 sft -c tiny
before, after = (made.measured(when)["loss_token"] for when in ("before", "after"))
print(f"held-out loss {before:.2f}, then {after:.2f}; report: {made.report}")

message = answer(made, "How much is 3 plus 4?", thinking=False, max_new_tokens=20)
print(message["role"], "says", repr(message["content"]))
try:
    folder: Path = export(made, "output/published")  # weights, tokenizer, template and model card
    print("published:", sorted(path.name for path in folder.iterdir()))
except UserError as error:
    print(error)
