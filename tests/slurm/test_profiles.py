"""env.toml: what is read, from where, and what is refused. Needs no Slurm."""

import dataclasses

import pytest
from commands import ENV_TOML
from hypothesis import given
from hypothesis import strategies as st

from nemotron_nb.core import UserError
from nemotron_nb.ops import profiles
from nemotron_nb.ops.profiles import PLANNED, SECTIONS, Profile, env_section, find_env_toml, load_profile, project_root

EXAMPLE = project_root() / "papermill_runs" / "env.toml.example"


def test_a_profile_of_the_published_form_is_read(tmp_path):
    (tmp_path / "env.toml").write_text(ENV_TOML)
    profile = load_profile("YOUR-CLUSTER", tmp_path / "env.toml")
    assert (profile.account, profile.nodes, profile.ranks_per_node, profile.mem, profile.exclusive, profile.mounts) == ("YOUR-ACCOUNT", 2, 8, "0", True, ("/lustre:/lustre",))
    assert env_section("wandb", tmp_path / "env.toml") == {"project": "nemotron", "entity": "YOUR-TEAM"}


def test_every_key_may_be_given(tmp_path):
    values = {"tunnel": "local", "executor": "slurm", "time": "04:00:00", "mem": "64G", "mounts": ["/a:/b"], "env_vars": {"A": "1"}, "additional_parameters": {"qos": "high"}}
    kinds = {int: 3, bool: True, str: "x"}
    for f in dataclasses.fields(Profile):
        if f.name != "name":
            values.setdefault(f.name, next(value for kind, value in kinds.items() if kind.__name__ in str(f.type)))
    quoted = {True: "true", False: "false"}
    lines = [f"{k} = {quoted[v] if isinstance(v, bool) else v if isinstance(v, int) else '{' + ', '.join(f'{a} = {b!r}' for a, b in v.items()) + '}' if isinstance(v, dict) else repr(v)}" for k, v in values.items()]
    (tmp_path / "env.toml").write_text("[all]\n" + "\n".join(lines))
    read = dataclasses.asdict(load_profile("all", tmp_path / "env.toml"))
    assert read == values | {"name": "all", "mounts": ("/a:/b",)}


def test_the_example_is_whole():
    names = ["cluster", "cluster-offline", "large", "local-slurm", "here"]
    loaded = {name: load_profile(name, EXAMPLE) for name in names}
    assert loaded["large"].nodes == 4 and loaded["large"].account == loaded["cluster"].account
    assert loaded["cluster-offline"].env_vars["HF_HUB_OFFLINE"] == "1" and loaded["here"].executor == "local"
    assert all(isinstance(env_section(name, EXAMPLE), dict) for name in SECTIONS)


def test_the_first_place_wins_and_none_is_no_error(tmp_path, monkeypatch):
    here, root, named = tmp_path / "here", tmp_path / "checkout", tmp_path / "named.toml"
    here.mkdir(), root.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(profiles, "library_folder", lambda: root / "nemotron_nb")
    monkeypatch.setenv("NEMOTRON_ENV_TOML", str(named))
    assert find_env_toml() is None and env_section("wandb") == {}
    with pytest.raises(UserError, match="there is no env.toml, so no profile 'x'"):
        load_profile("x")
    for place in (named, root / "env.toml", here / "env.toml"):
        place.write_text(f"[x]\naccount = '{place.name}-{place.parent.name}'\n")
        assert find_env_toml() == place and load_profile("x").account == f"{place.name}-{place.parent.name}"


@given(st.lists(st.dictionaries(st.sampled_from(["account", "partition", "job_name", "host"]), st.text("abc", min_size=1, max_size=3)), min_size=1, max_size=5))
def test_a_chain_of_profiles_is_one_dictionary_update_after_the_other(tmp_path_factory, chain):
    tables = [f"[p{i}]\n" + (f'extends = "p{i - 1}"\n' if i else "") + "".join(f'{k} = "{v}"\n' for k, v in keys.items()) for i, keys in enumerate(chain)]
    file = tmp_path_factory.mktemp("chain") / "env.toml"
    file.write_text("\n".join(reversed(tables)))
    expected = {}
    for keys in chain:
        expected |= keys
    assert load_profile(f"p{len(chain) - 1}", file) == Profile(name=f"p{len(chain) - 1}", **expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[c]\ngpu_per_node = 8", "did you mean 'gpus_per_node'"),
        ('[base]\nacount = "x"\n[c]\nextends = "base"', "did you mean 'account'"),
        ('[c]\nextends = "c"', "circle: c -> c"),
        ('[c]\nextends = "nobody"', "'c' extends 'nobody', which is not there"),
        ("[c]\nextends = 3", "expected the name of a profile"),
        ("[c]\nnodes = true", "expected int"),
        ('[c]\nname = "d"', "unknown key 'name'"),
        ('[c]\nmounts = ["/a:/b,/c:/d"]', "is not host:container"),
        ('[c]\ntime = "1:2:3:4"', "is not understood"),
        ('[c]\ntunnel = "ssh"', "is not there yet"),
        ('[c]\nexecutor = "slrum"', "did you mean 'slurm'"),
        ('[c]\nadditional_parameters = {"--qos x" = "1"}', "is no name"),
        ("[d]\n", "there is no profile 'c'"),
        ("c = 1\n", "stands in no table"),
        ("[c\n", "cannot be read as TOML"),
        *((f'[c]\nexecutor = "{name}"', f"'{name}' is planned and not there yet") for name in PLANNED),
    ],
)
def test_what_is_refused(tmp_path, text, said):
    (tmp_path / "env.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        load_profile("c", tmp_path / "env.toml")


@pytest.mark.parametrize(("text", "said"), [("[wandb]\nprojekt = 'x'", "did you mean 'project'"), ("[cli]\ntheme = 3", "expected str"), ("[cache]\ngit = 'x'", "did you mean 'git_dir'")])
def test_the_common_tables_refuse_too(tmp_path, text, said):
    (tmp_path / "env.toml").write_text(text)
    with pytest.raises(UserError, match=said):
        env_section(text[1 : text.index("]")], tmp_path / "env.toml")
