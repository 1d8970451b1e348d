"""Queries in PostgreSQL and MariaDB: servers of one's own, started here; right rows pass, planted wrongs and attacks do not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron_nb.core import UserError
from nemotron_nb.synth import sql, verify_sql
from nemotron_nb.synth import sql_servers as servers
from nemotron_nb.synth.pipelines import PIPELINES
from nemotron_nb.synth.produce import produce
from nemotron_nb.synth.row import PASSED, REFUSED, UNVERIFIED
from nemotron_nb.synth.sql_servers import NoServer, QueryError, server_of, translated, why_absent
from nemotron_nb.synth.steps import Fallen, Workshop, make_row

CHANGES = [
    ("COUNT(*)", "COUNT(*) + 1"), ("COUNT(*)", "COUNT(DISTINCT f.kind)"), (" DESC", " ASC"), (">= ", "> "), ("NOT EXISTS", "EXISTS"),
    ("SUM(", "MAX("), ("AVG(", "MIN("), ("f.kind = '", "f.kind <> '"), ("LIMIT 2", "LIMIT 3"), ("LIMIT 3", "LIMIT 2"), ("= '2022'", "= '2023'"),
    ("= '2023'", "= '2024'"), ("= '2024'", "= '2022'"), ("LEFT JOIN", "JOIN"), ("place = 1", "place = 2"), ("THEN 1 ELSE 0", "THEN 0 ELSE 1"),
]  # fmt: skip


def here(engine):
    """A parameter that is skipped, with what is missing, where an engine is not here."""
    return pytest.param(engine, marks=pytest.mark.skipif(bool(why_absent(engine)[0]), reason=why_absent(engine)[1] or engine))


ENGINES = [here("postgresql"), here("mariadb")]
LAMPS = [("CREATE TABLE lamps (id INTEGER PRIMARY KEY, room TEXT, watts INTEGER)", [(i, ["hall", "Attic", "shed"][i % 3], 5 * i) for i in range(1, 13)])]
ROOMS = "SELECT room, SUM(watts) FROM lamps GROUP BY room ORDER BY room"


@pytest.fixture(scope="module", autouse=True)
def servers_are_stopped():
    yield
    for engine in ("postgresql", "mariadb"):
        if not why_absent(engine)[0]:
            server_of(engine).stop()


def answers(data, query, ordered, engine):
    """What a query says in each database of a row."""
    return verify_sql.result_digests(data, query, ordered, engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("count", [3, pytest.param(200, marks=pytest.mark.long)])
def test_right_rows_pass_and_planted_wrongs_are_caught(engine, count):
    workshop, rows, index = Workshop(sql.SqlSettings(engine=engine)), [], 0
    while len(rows) < count:
        made = make_row("sql", sql.STEPS, workshop, index, "recipe")
        index += 1
        assert not isinstance(made, Fallen) or made.reason in ("empty_result", "null_in_result", "hardly_depends_on_data"), made
        rows += [] if isinstance(made, Fallen) else [json.loads(json.dumps(made))]
    planted = caught = 0
    for row in rows:
        proofs = sql.judge_sql(row)
        assert {p.status for p in proofs} == {PASSED} and proofs[0].verifier.startswith(f"{engine} 1"), proofs
        assert verify_sql.query_of(row["messages"][-1]["content"]) == row["synth"]["answer"]
        check, query = row["synth"]["check"], row["synth"]["answer"]
        data, right = verify_sql.SqlData.of_json(check["data"]), check["expected"]
        for old, new in CHANGES:
            wrong = query.replace(old, new)
            if wrong == query or answers(data, wrong, check["ordered"], engine) == right:
                continue  # no verifier that runs could tell
            planted += 1
            spoilt = json.loads(json.dumps(row))
            spoilt["messages"][-1]["content"] = f"```sql\n{wrong}\n```"
            proof = sql.judge_sql(spoilt)[-1]
            caught += proof.status == REFUSED and bool(proof.reason)
    assert planted >= count and caught == planted


@pytest.mark.parametrize("engine", ENGINES)
def test_the_grammar_says_the_same_in_every_database(engine):
    for seed in range(3):
        for name in sql.CONCEPTS:
            draft_rng = random.Random(f"{seed}/{name}")
            world = sql.draw_world(draft_rng)
            asked, data = sql.CONCEPTS[name](world, draft_rng), sql.database_of(world)
            there = verify_sql.run_query(data, translated(asked.query, engine), asked.ordered, engine)
            assert there == verify_sql.run_query(data, asked.query, asked.ordered), (name, asked.query)


HOSTILE = {
    "postgresql": [
        "SELECT pg_read_file('/etc/passwd')", "SELECT set_config('role', 'owner', false)", "SELECT lo_import('/etc/passwd')",
        "SELECT query_to_xml('DELETE FROM lamps', true, true, '')", "SELECT query_to_xml('CREATE TEMPORARY TABLE x (i INT)', true, true, '')",
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'owner'", "SELECT REPEAT('a', 300000000)",
        "SELECT generate_series(1, 1000000000000)", "SELECT 1; SELECT 2", "SET ROLE owner", "COPY (SELECT 1) TO PROGRAM 'id'", "SELECT * INTO x FROM lamps",
    ],
    "mariadb": [
        "SELECT * FROM mysql.user", "SELECT 1 INTO OUTFILE '/tmp/x'", "SET STATEMENT max_statement_time=0 FOR SELECT 1", "SELECT seq FROM seq_1_to_100000000000",
        "SELECT seq, REPEAT('a', 900000) FROM seq_1_to_1000", "SELECT 1; SELECT 2", "DELETE FROM lamps", "DO SLEEP(9)", "CALL mysql.x()",
    ],
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_a_hostile_query_gets_nothing_and_changes_nothing(engine):
    server = server_of(engine)
    for query in HOSTILE[engine]:
        with pytest.raises(QueryError):
            server.ask(LAMPS, query)
        assert server.ask(LAMPS, ROOMS) == [("Attic", 110), ("hall", 150), ("shed", 130)], query
    if os.geteuid() == 0:
        assert f"Uid:\t{65534}" in Path(f"/proc/{server._process.pid}/status").read_text()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_query_that_never_ends_is_stopped_by_the_server(engine):
    never = {"postgresql": "SELECT COUNT(*) FROM lamps a, lamps b, lamps c, lamps d, lamps e, lamps f, lamps g, lamps h WHERE a.watts + b.watts + c.watts + d.watts + e.watts + f.watts + g.watts + h.watts = 1", "mariadb": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n"}[engine]
    with pytest.raises(QueryError, match="(?i)timeout|interrupted|size exceeds|memory"):
        server_of(engine).ask(LAMPS, never)


@pytest.mark.parametrize("engine", ENGINES)
def test_texts_are_compared_as_sqlite_does(engine):
    [row] = server_of(engine).ask(LAMPS, "SELECT SUM(CASE WHEN room = 'attic' THEN 1 ELSE 0 END), SUM(CASE WHEN room = 'Attic ' THEN 1 ELSE 0 END), SUM(CASE WHEN room = 'Attic' THEN 1 ELSE 0 END) FROM lamps")
    assert row == (0, 0, 4)


@pytest.mark.parametrize("engine", ENGINES)
def test_tables_of_strangers_are_plain_tables_or_nobody_judges(engine):
    for create in ("CREATE TABLE a AS SELECT 1", "DROP TABLE lamps", "CREATE TABLE other.a (i INTEGER)", "COPY a TO PROGRAM 'id'", "CREATE TABLE a (i NOTYPE(", "CREATE TABLE a (i INTEGER); DROP TABLE a"):
        data = verify_sql.SqlData((verify_sql.SqlTable("a", create, ((1,), (2,))),))
        [proof] = verify_sql.verify_sql(data, "SELECT COUNT(*) FROM a", engine=engine)
        assert (proof.status, proof.reason) == (UNVERIFIED, "tables_cannot_be_made"), create


@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_that_goes_away_leaves_the_query_open_and_comes_back(engine, monkeypatch):
    server = server_of(engine)
    server.start()
    answer = type(server._kind).answer

    def dies(kind, reader, case, query):
        server._process.kill()
        server._process.wait()
        return answer(kind, reader, case, query)

    with monkeypatch.context() as patch:
        patch.setattr(type(server._kind), "answer", dies)
        with pytest.raises(NoServer) as gone:
            server.ask(LAMPS, ROOMS)
    assert gone.value.reason == "server_gone"
    assert len(server.ask(LAMPS, ROOMS)) == 3


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_server_dies_with_its_process_and_the_next_one_removes_its_folder(engine, sent):
    program = f"from nemotron_nb.synth.sql_servers import server_of\ns = server_of({engine!r})\ns.start()\nprint(s._process.pid, s._kind.folder, flush=True)\nimport time; time.sleep(600)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid, folder = process.stdout.readline().split()
    assert folder not in servers.remove_left_folders() and Path(folder, "data").is_dir()
    process.send_signal(sent)
    assert process.wait() == -sent
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes()
    assert Path(folder).is_dir()  # nobody was there to remove it
    next_one = servers.SqlServer(engine)
    next_one.start()
    assert not Path(folder).exists() and not Path(f"{folder}.lock").exists()
    own = next_one._kind.folder
    next_one.stop()
    assert not Path(own).exists() and not Path(f"{own}.lock").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path, monkeypatch):
    """What is no lock file of ours is neither opened nor removed, nor is what it points to."""
    monkeypatch.setattr(servers, "_TMP", tmp_path)
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    (tmp_path / "sql-a.lock").symlink_to(precious / "new")
    (tmp_path / "sql-a").symlink_to(precious)
    (tmp_path / "sql-b").mkdir()
    (tmp_path / "sql-c").symlink_to(precious)
    (tmp_path / "sql-c.lock").touch()
    assert servers.remove_left_folders() == [str(tmp_path / "sql-c")]
    assert (precious / "sub").is_dir() and not (precious / "new").exists() and (tmp_path / "sql-b").is_dir()


@pytest.mark.parametrize(("engine", "missing", "reason"), [("postgresql", "find_program", "no_postgresql"), ("mariadb", "find_program", "no_mariadb"), ("postgresql", "sqlglot", "no_sqlglot"), ("mariadb", "pymysql", "no_pymysql")])
def test_an_engine_that_is_not_here_never_passes(engine, missing, reason, monkeypatch, tmp_path):
    find_spec = servers.importlib.util.find_spec
    if missing == "find_program":
        monkeypatch.setattr(servers, "find_program", lambda name: "")
    else:
        monkeypatch.setattr(servers, "find_program", lambda name: f"/usr/bin/{name}")
        monkeypatch.setattr(servers.importlib.util, "find_spec", lambda name: None if name == missing else find_spec("json"))
    monkeypatch.setattr(verify_sql, "server_of", servers.SqlServer)
    data = verify_sql.SqlData((verify_sql.SqlTable("a", "CREATE TABLE a (i INTEGER)", ((1,), (2,))),))
    [proof] = verify_sql.verify_sql(data, "SELECT COUNT(*) FROM a", engine=engine)
    assert (proof.status, proof.reason) == (UNVERIFIED, reason)
    with pytest.raises(UserError, match=reason):
        produce(PIPELINES["sql"], sql.SqlSettings(engine=engine, rows=3), tmp_path / "run")


def test_an_unknown_engine_names_the_nearest():
    for ask in (lambda: sql.SqlSettings(engine="postgres"), lambda: why_absent("postgres"), lambda: server_of.__wrapped__("postgres").start()):
        with pytest.raises(UserError, match="did you mean 'postgresql'"):
            ask()


@pytest.mark.parametrize("create", ["ATTACH '/tmp/x.db' AS other", "CREATE TABLE a AS SELECT 1", "PRAGMA writable_schema = 1", "DROP TABLE a", "CREATE TRIGGER t AFTER INSERT ON a BEGIN SELECT 1; END", "x"])
def test_in_sqlite_too_a_table_is_made_by_its_statement_and_nothing_else_happens(create, tmp_path):
    data = verify_sql.SqlData((verify_sql.SqlTable("a", create.replace("/tmp", str(tmp_path)), ()),))
    found = verify_sql.verify_sql(data, "SELECT COUNT(*) FROM a")[-1]
    assert found.status != PASSED and not list(tmp_path.iterdir())
