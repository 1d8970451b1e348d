"""Cleaning at scale: how many chats a second and a core, in how much memory, and is what was planted found?

    python benchmarks/clean.py [--rows 20000 100000] [--only exact near decontaminate all]

Chats are made up, each with a question of its own; one in a hundred is there twice, one in a hundred is nearly there
twice, one in a hundred asks a question of one of five test sets with other names and other numbers. Processor time of
one process, and its peak memory.
"""

import argparse
import json
import random
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from resource import RUSAGE_SELF, getrusage

from nemotron_nb.data.clean import Cleaning, clean

EXAMS, QUESTIONS, EVERY = 5, 1_000, 100
ALONE = {"exact": False, "near": False, "quality": False, "personal": "keep"}
SETTINGS = {
    "exact": ALONE | {"exact": True}, "near": ALONE | {"near": True}, "decontaminate": ALONE, "all": {},
}  # fmt: skip
PLANTED = {"exact": "same_words", "near": "nearly_the_same", "decontaminate": "contaminated"}  # reason that is given
_ENDS = "al bro cas dre ela fin gor hul isk jar kev lom mir nys ost pra qui rud sil tov ulm vex wyn yar zel".split()


def word(rng, syllables=3):
    """A word that nobody knows."""
    return "".join(rng.choice(_ENDS) for _ in range(syllables))


def question(seed, name, numbers):
    """A question of its own: two of one seed differ in names and numbers alone."""
    rng, (a, b) = random.Random(seed), numbers
    w = [word(rng, 7) for _ in range(9)]
    return (
        f"On {w[0]} day {name} brings {a} {w[1]} {w[2]}s to the {w[3]} of {w[4]}, sells {b} of them to a {w[5]}, and "
        f"carries {a - b} {w[8]} home. How many of the {a} {w[2]}s did the {w[6]} leave beside the {w[7]}?"
    )


def chat(rng, asked):
    """A chat about a question."""
    thought = " ".join(word(rng) for _ in range(60))
    said = f"{thought}. So it is {rng.randint(1, 99)}."
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]}


def name_and_numbers(rng):
    """Other ones."""
    a = rng.randint(20, 99)
    return word(rng).capitalize(), (a, rng.randint(2, a - 1))


def write_files(folder, count):
    """The chats and the test sets; how many of each kind were planted."""
    rng = random.Random(0)
    for exam in range(EXAMS):
        lines = (json.dumps({"question": question(f"{exam}/{k}", *name_and_numbers(rng))}) for k in range(QUESTIONS))
        (folder / f"exam{exam}.jsonl").write_text("\n".join(lines) + "\n")
    planted = dict.fromkeys(PLANTED.values(), 0)
    with open(folder / "chats.jsonl", "w") as file:
        last = chat(rng, question("first", *name_and_numbers(rng)))
        for i in range(count):
            kind = {1: "exact", 2: "near", 3: "decontaminate"}.get(i % EVERY, "")
            row = chat(rng, question(f"chat/{i}", *name_and_numbers(rng)))
            if kind == "exact":
                row = last
            elif kind == "near":
                words = last["messages"][1]["content"].split()
                words[rng.randrange(20, 40)] = word(rng)
                row = {"messages": [last["messages"][0], {"role": "assistant", "content": " ".join(words)}]}
            elif kind == "decontaminate":
                of = f"{rng.randrange(EXAMS)}/{rng.randrange(QUESTIONS)}"
                row = chat(rng, question(of, *name_and_numbers(rng)))
            if kind:
                planted[PLANTED[kind]] += 1
            else:
                last = row
            file.write(json.dumps(row) + "\n")
    return planted


def measured(folder, name):
    """(seconds of the processor, MiB at the peak, what was dropped), in a process of its own."""
    exams = [f"{folder}/exam{exam}.jsonl" for exam in range(EXAMS)] if name in ("decontaminate", "all") else []
    cleaning = Cleaning(kind="sft", decontaminate=exams, **SETTINGS[name])
    start = getrusage(RUSAGE_SELF)
    ledger = clean([f"{folder}/chats.jsonl"], cleaning, f"{folder}/out_{name}")
    end = getrusage(RUSAGE_SELF)
    return end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime, end.ru_maxrss / 1024, dict(ledger["dropped"])


def found(dropped, planted):
    """What was dropped, of what was planted."""
    return ", ".join(f"{reason} {count:,} of {planted.get(reason, 0):,}" for reason, count in dropped.items())


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="*", default=[20_000, 100_000])
    parser.add_argument("--only", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    asked = parser.parse_args()
    print("{:>8} {:<14} {:>9} {:>9} {:>9}   {}".format("chats", "asked", "chats/s", "seconds", "MiB", "found of planted"))
    for count in asked.rows:
        with tempfile.TemporaryDirectory() as name:
            planted = write_files(Path(name), count)
            for setting in asked.only:
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    seconds, memory, dropped = pool.submit(measured, name, setting).result()
                speed = f"{count / seconds:9,.0f} {seconds:9.1f} {memory:9.0f}"
                print(f"{count:8,} {setting:<14} {speed}   {found(dropped, planted)}", flush=True)


if __name__ == "__main__":
    main()
