"""The command line: precedence, sources, and what each mistake says."""

import ast
import dataclasses
import inspect
import os
import subprocess
import sys

import pytest
import yaml

from swarm import cli
from swarm.cli import EXAMPLE_PEER, parse
from swarm.config import PeerConfig, RunConfig
from swarm.errors import ConfigError

GOOD = f"/ip4/203.0.113.7/tcp/31337{EXAMPLE_PEER}"
OTHER = f"/dns4/peer.example.org/tcp/31338{EXAMPLE_PEER}"


@pytest.fixture
def config_file(tmp_path):
    def write(text):
        path = tmp_path / "peer.yaml"
        path.write_text(text)
        return str(path)

    return write


def refused(argv, environ=None):
    with pytest.raises(ConfigError) as caught:
        parse(argv, environ or {})
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_nothing_said_means_the_defaults_of_peer_config():
    assert parse([], {}) == PeerConfig()


def test_every_field_is_an_option_with_help_and_the_table_names_no_other():
    assert sorted(key for options in cli._HELP.values() for key in options) == sorted(cli._FIELDS)
    help_text = cli.make_parser().format_help()
    for field in dataclasses.fields(PeerConfig):
        assert f"--{field.name.replace('_', '-')}" in help_text


def test_all_flags_arrive():
    argv = (
        "--home /h --name amber --role rendezvous --device cuda:1 --threads 3 --listen /ip4/0.0.0.0/tcp/0 -v "
        "--ui json --announce /ip4/203.0.113.7/tcp/5 --run-id demo-0123456789ab --until-tokens 20M"
        " --join-timeout-s 2.5 --fragments 1:3 --max-memory 6GB"
        " --spare-disk 2GB"
    )
    assert parse([*argv.split(), "--initial-peers", GOOD, OTHER], {}) == PeerConfig(
        initial_peers=[GOOD, OTHER], run_id="demo-0123456789ab", home="/h", name="amber", role="rendezvous",
        device="cuda:1", threads=3, listen=["/ip4/0.0.0.0/tcp/0"], announce=["/ip4/203.0.113.7/tcp/5"],
        until_tokens=20_000_000, ui="json", join_timeout_s=2.5, verbose=True, fragments="1:3",
        max_memory=6_000_000_000, spare_disk=2_000_000_000,
    )  # fmt: skip
    assert parse(["--new-swarm", "--run", "my.yaml"], {}) == PeerConfig(new_swarm=True, run="my.yaml")


@pytest.mark.parametrize(
    "argv",
    [
        ["--initial-peers", GOOD, OTHER],
        ["--initial_peers", GOOD, OTHER],
        [f"--initial_peers={GOOD}", f"--initial-peers={OTHER}"],
        [f"--initial-peers={GOOD},{OTHER}"],
        ["--initial-peers", GOOD, "--initial-peers", OTHER],
    ],
)
def test_every_usual_spelling_of_initial_peers_is_understood(argv):
    assert parse(argv, {}).initial_peers == [GOOD, OTHER]


def test_flag_beats_environment_beats_file_beats_default(config_file):
    path = config_file("threads: 1\nname: from-file\nhome: /from-file\n")
    environ = {"SWARM_THREADS": "2", "SWARM_NAME": "from-environment"}
    config = parse(["--config", path, "--threads", "3"], environ)
    assert (config.threads, config.name, config.home, config.ui) == (3, "from-environment", "/from-file", "auto")


def test_a_list_is_replaced_by_the_stronger_source_not_added_to(config_file):
    path = config_file(f"initial-peers: [{OTHER}]")
    assert parse(["--config", path], {}).initial_peers == [OTHER]
    assert parse(["--config", path], {"SWARM_INITIAL_PEERS": GOOD}).initial_peers == [GOOD]
    assert parse(["--config", path, "--initial-peers", GOOD], {"SWARM_INITIAL_PEERS": OTHER}).initial_peers == [GOOD]


def test_variables_take_commas_and_truths_and_empty_means_not_set():
    assert parse([], {"SWARM_INITIAL_PEERS": f"{GOOD}, {OTHER},"}).initial_peers == [GOOD, OTHER]
    assert parse([], {"SWARM_VERBOSE": "1"}).verbose and parse([], {"SWARM_NEW_SWARM": "true"}).new_swarm
    assert not parse([], {"SWARM_VERBOSE": "no"}).verbose
    assert parse([], {"SWARM_HOME": "", "SWARM_INITIAL_PEERS": "", "SWARM_SOMETHING_ELSE": "x"}) == PeerConfig()


def test_a_variable_set_to_no_beats_the_file(config_file):
    assert not parse(["--config", config_file("verbose: yes")], {"SWARM_VERBOSE": "no"}).verbose


@pytest.mark.parametrize("key", ["initial-peers", "initial_peers"])
def test_file_keys_take_dashes_and_underscores_one_value_or_many(config_file, key):
    assert parse(["--config", config_file(f"{key}:\n  - {GOOD}\n  - {OTHER}\n")], {}).initial_peers == [GOOD, OTHER]
    assert parse(["--config", config_file(f"{key}: {GOOD}")], {}).initial_peers == [GOOD]


def test_file_values_keep_their_kind(config_file):
    text = "until-tokens: 5000\nverbose: true\nname: 123\nrun: null\nnew-swarm: false\njoin-timeout-s: 5\n"
    assert parse(["--config", config_file(text)], {}) == PeerConfig(
        until_tokens=5000, verbose=True, name="123", join_timeout_s=5.0
    )
    assert parse(["--config", config_file("")], {}) == PeerConfig()


@pytest.mark.parametrize(("text", "span"), [("auto", None), ("0:1", (0, 1)), ("1:3", (1, 3)), ("12:256", (12, 256))])
def test_fragments_mean_the_same_from_every_source(config_file, text, span):
    """YAML alone would take 1:3 for sixty-three."""
    for config in (
        parse(["--fragments", text], {}), parse([], {"SWARM_FRAGMENTS": text}),
        parse(["--config", config_file(f"fragments: {text}")], {}),
        parse(["--config", config_file(f'fragments: "{text}"')], {}),
    ):  # fmt: skip
        assert (config.fragments, config.fragment_span) == (text, span)


def test_asking_for_a_number_of_fragments_is_told_who_decides_that():
    message = refused(["--fragments", "2", "--initial-peers", GOOD])
    assert "decided by the swarm" in message and "--fragments 0:2" in message
    assert "(from environment SWARM_FRAGMENTS)" in refused([], {"SWARM_FRAGMENTS": "4"})


@pytest.mark.parametrize(("text", "num_bytes"), [("6GB", 6 * 10**9), ("1.5 GiB", 3 * 2**29), ("800000000", 8 * 10**8)])
def test_memory_is_a_size_in_every_source(config_file, text, num_bytes):
    assert parse([f"--max-memory={text}"], {}).max_memory == num_bytes
    assert parse([], {"SWARM_MAX_MEMORY": text}).max_memory == num_bytes
    assert parse(["--config", config_file(f"max-memory: {text}")], {}).max_memory == num_bytes


def test_disk_for_spares_is_a_size_too_and_may_be_nothing(config_file):
    assert parse([], {}).spare_disk is None, "a share of what is free"
    assert parse(["--spare-disk", "0"], {}).spare_disk == 0
    assert parse([], {"SWARM_SPARE_DISK": "2GB"}).spare_disk == 2 * 10**9
    assert parse(["--config", config_file("spare-disk: 512MiB")], {}).spare_disk == 2**29
    assert "--spare-disk" in refused(["--spare-disk", "much"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("thraeds: 2", "unknown key 'thraeds'"),
        ("config: other.yaml", "unknown key 'config'"),
        ("threads: [1, 2]", "must be one value"),
        ("name: {a: b}", "must be one value"),
        ("initial-peers: [[a]]", "must be one value"),
        ("- threads", "must be keys and values"),
        ("threads: {", "is not YAML"),
        ("\x01", "is not YAML"),
        ("threads: many", "'many'"),
        ("verbose: perhaps", "perhaps"),
        ("1: 2", "unknown key '1'"),
    ],
)
def test_a_bad_file_is_named(config_file, text, said):
    path = config_file(text)
    message = refused(["--config", path])
    assert said in message
    assert path in message or "verbose" in message


def test_a_missing_file_is_named(tmp_path):
    assert "nowhere.yaml" in refused(["--config", str(tmp_path / "nowhere.yaml")])


def test_a_file_in_another_encoding_is_a_stated_error(tmp_path):
    (tmp_path / "peer.yaml").write_bytes(b"name: \xff\xfe\n")
    assert "is not YAML" in refused(["--config", str(tmp_path / "peer.yaml")])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--run", "demo.yaml"], "--run is only for --new-swarm"),
        (["--run", "demo.yaml", "--initial-peers", GOOD], "--run is only for --new-swarm"),
        (["--new-swarm", "--initial-peers", GOOD], "--initial-peers cannot be used together with --new-swarm"),
        (["--new-swarm", "--run-id", "demo-0123456789ab"], "--run-id cannot be used together with --new-swarm"),
        (["--role", "worker"], "--role must be one of trainer, rendezvous"),
        (["--ui", "web"], "--ui must be one of auto, plain, live, json"),
        (["--until-tokens", "0"], "--until-tokens must be over 0"),
        (["--until-tokens=-5"], "--until-tokens must be over 0"),
        (["--until-tokens", "lots"], "20M"),
        (["--threads=-1"], "--threads must be 0"),
        (["--threads", "two"], "'two'"),
        (["--device", "gpu"], "--device must be auto"),
        (["--device", "cuda:x"], "--device must be auto"),
        (["--fragments", "2"], "--fragments must be auto or A:B"),
        (["--fragments", "all"], "'all' is neither auto nor of the form A:B"),
        (["--fragments", "2:2"], "there are no fragments from 2 to before 2"),
        (["--fragments", "3:1"], "there are no fragments from 3 to before 1"),
        (["--fragments=-1:2"], "--fragments must be auto or A:B"),
        (["--fragments", "0:257"], "there are no fragments from 0 to before 257"),
        (["--max-memory", "lots"], "6GB or 512MiB"),
        (["--max-memory", "6 parsecs"], "6GB or 512MiB"),
        (["--max-memory", "100MB"], "--max-memory must be 750 MB or more"),
        (["--max-memory", "6"], "got 6 B"),
        (["--join-timeout-s", "nan"], "--join-timeout-s must be over 0"),
        (["--join-timeout-s", "0"], "--join-timeout-s must be over 0"),
        (["--join-timeout-s", "soon"], "soon"),
        (["--name", "a\x1b[2J"], "--name must be 1 to 40 visible characters"),
        (["--name", "x" * 41], "--name must be 1 to 40 visible characters"),
        (["--home", " "], "--home must be a folder"),
        (["--run-id", "../../etc"], "--run-id must look like"),
        (["--listen", "31337"], "--listen has a bad address"),
        (["--announce", "/ip4/300.0.0.1/tcp/1"], "not an ip4 address"),
        (["--thread", "2"], "unrecognized arguments: --thread"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["stray"], "unrecognized arguments: stray"),
        (["--home"], "expected one argument"),
        (["--initial-peers"], "expected at least one argument"),
    ],
)
def test_contradictions_and_nonsense_are_usage_errors(argv, said):
    assert said in refused(argv)


@pytest.mark.parametrize("bad", ["203.0.113.7:31337", "/ip4/203.0.113.7/tcp/31337", "/ip4/203.0.113.7/tcp/x/p2p/Qm"])
def test_a_bad_initial_peer_is_shown_with_a_good_one(bad):
    message = refused(["--initial-peers", GOOD, bad])
    assert bad in message
    assert "why:" in message
    assert f"a good one: /ip4/203.0.113.7/tcp/31337{EXAMPLE_PEER}" in message


def test_an_escape_sequence_in_an_address_does_not_reach_the_terminal():
    assert "\x1b" not in refused(["--initial-peers", "/ip4/\x1b[2J/tcp/1"])


def test_a_mistake_says_which_source_it_is_from(config_file):
    assert "environment SWARM_THREADS" in refused([], {"SWARM_THREADS": "many"})
    assert "environment SWARM_THREADS" in refused([], {"SWARM_THREADS": "-1"})
    path = config_file("role: worker")
    assert f"(from file {path})" in refused(["--config", path])
    message = refused(["--new-swarm"], {"SWARM_INITIAL_PEERS": GOOD})
    assert "--initial-peers (from environment SWARM_INITIAL_PEERS) cannot be used together with --new-swarm" in message


@pytest.mark.parametrize(
    ("argv", "setting", "asked"),
    [
        (["--averaging.bits", "8"], "averaging.bits", "8"),
        (["--bits=8"], "averaging.bits", "8"),
        (["--train.learning-rate", "0.1"], "train.learning_rate", "0.1"),
        (["--learning_rate", "0.1"], "train.learning_rate", "0.1"),
        (["--seed", "1", "--initial-peers", GOOD], "seed", "1"),
        (["--model.source", "gpt2"], "model.source", "gpt2"),
        (["--stdlib", "--verbose"], "data.stdlib", "true"),
    ],
)
def test_a_flag_for_what_the_swarm_decides_is_answered_as_such(argv, setting, asked):
    assert f"this is decided by the swarm ({setting}); you asked for {asked}\n" in refused(argv)


@pytest.mark.parametrize(
    ("text", "setting", "asked"),
    [
        ("averaging.bits: 8", "averaging.bits", "8"),
        ("bits: 8", "averaging.bits", "8"),
        ("averaging: {bits: 8}", "averaging.bits", "8"),
        ("train:\n  learning-rate: 0.1\n", "train.learning_rate", "0.1"),
        ("threads: 1\nseed: 7", "seed", "7"),
        ("model: {config: {model_type: gptj}}", "model.config", "{'model_type': 'gptj'}"),
    ],
)
def test_a_file_key_for_what_the_swarm_decides_is_answered_as_such(config_file, text, setting, asked):
    path = config_file(text)
    assert f"{path}: this is decided by the swarm ({setting}); you asked for {asked}\n" in refused(["--config", path])


def test_every_run_setting_is_known_by_its_full_and_its_short_name():
    for field in dataclasses.fields(RunConfig):
        # --name is the peer's, and --fragments says which of them it holds
        assert field.name in cli._RUN_KEYS or field.name in ("name", "fragments")
    for full in ("averaging.tokens_per_round", "train.betas", "data.held_out_percent", "model.revision"):
        assert cli._RUN_KEYS[full] == full
        assert full.split(".")[1] in cli._RUN_KEYS
    assert not cli._RUN_KEYS.keys() & cli._FIELDS.keys()


def printed(capsys, argv, environ=None):
    with pytest.raises(SystemExit) as caught:
        parse([*argv, "--print-config"], environ or {})
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_print_config_shows_each_value_and_its_source(capsys, config_file):
    path = config_file("home: /from-file\nui: plain")
    lines = printed(capsys, ["--config", path, "-v", "--ui=json"], {"SWARM_INITIAL_PEERS": GOOD}).splitlines()
    assert len(lines) == len(dataclasses.fields(PeerConfig))
    assert f'home: "/from-file"  # file {path}' in lines
    assert f'initial-peers: ["{GOOD}"]  # environment SWARM_INITIAL_PEERS' in lines
    assert 'ui: "json"  # flag' in lines
    assert "verbose: true  # flag" in lines
    assert "threads: 0  # default" in lines
    assert "run: null  # default" in lines


def test_what_print_config_prints_is_a_config_file(capsys, config_file):
    argv = ["--initial-peers", GOOD, "--name", "amber: #1", "--until-tokens", "5k", "--threads", "2"]
    text = printed(capsys, argv)
    assert yaml.safe_load(text)["until-tokens"] == 5000
    assert parse(["--config", config_file(text)], {}) == parse(argv, {})


def test_print_config_shows_the_sources_of_a_contradiction_before_it_refuses(capsys):
    assert "--initial-peers" in refused(["--print-config", "--new-swarm"], {"SWARM_INITIAL_PEERS": GOOD})
    assert "# environment SWARM_INITIAL_PEERS" in capsys.readouterr().out


def test_help_names_the_two_ways_and_exits_0(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"], {})
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--new-swarm" in out and "--initial-peers" in out and "SWARM_HOME" in out


def test_help_imports_nothing_heavy():
    program = (
        "import sys\nfrom swarm.cli import parse\n"
        "try:\n    parse(['--help'], {})\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)\n"
    )
    environ = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    assert "--initial-peers" in done.stdout
    loaded = {name.split(".")[0] for name in done.stderr.split()}
    assert "configargparse" in loaded
    assert not loaded & {"torch", "hivemind", "transformers", "datasets", "numpy", "rich", "pydantic", "asyncio"}


def test_who_draws_no_text_does_not_load_what_reads_it():
    """A second or two of a start, and memory: of a chain only who holds the first fragment draws text."""
    program = "import sys, swarm.train.participant\nprint('\\n'.join(sys.modules))"
    environ = {**os.environ, "PYTHONPATH": "."}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environ)
    loaded = {name.split(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded and not loaded & {"datasets", "pandas", "pyarrow"}


def test_the_defaults_are_written_once():
    tree = ast.parse(inspect.getsource(cli))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    defaults = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "default"]
    assert [ast.unparse(default) for default in defaults] == ["[]", "field.default"]
