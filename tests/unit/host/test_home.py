"""The home folder: one peer at a time, whole files or none, and damage that never keeps a peer from starting."""

import json
import os
import resource
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swarm.errors import HomeError
from swarm.host.home import MAX_ADDRESSES, Home, atomic_write

RUN = "demo-0123456789ab"
as_a_user = pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")


@pytest.fixture
def home(tmp_path):
    with Home.open(tmp_path / "home") as opened:
        yield opened


def in_another_process(program, *arguments, **options):
    """Run `program` with this repository on its path; returns what it did."""
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environ, **options)


def files_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# --- the folder and its lock


def test_it_is_made_for_its_owner_alone_with_missing_parents(tmp_path):
    with Home.open(tmp_path / "a" / "b"):
        assert stat.S_IMODE((tmp_path / "a" / "b").stat().st_mode) == 0o700


def test_a_tilde_is_the_user_s_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with Home.open("~/.swarm") as home:
        assert home.path == tmp_path / ".swarm"


def test_a_second_peer_in_the_same_home_is_told_what_why_and_what_to_do(home):
    with pytest.raises(HomeError) as caught:
        Home.open(home.path)
    assert "two peers with the same home and identity" in caught.value.what
    assert f"(process {os.getpid()})" in caught.value.why
    assert "--home" in caught.value.do


def test_the_lock_holds_against_another_process_and_ends_with_its_holder(tmp_path):
    program = (
        "import os, signal, sys\nfrom swarm.host.home import Home\n"
        "home = Home.open(sys.argv[1])\nhome.key_bytes()\n"
        "if sys.argv[2] == 'die': os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with Home.open(tmp_path) as home:
        refused = in_another_process(program, tmp_path, "stay")
        assert "two peers with the same home" in refused.stderr
        key = home.key_bytes()
    assert in_another_process(program, tmp_path, "die").returncode == -9
    with Home.open(tmp_path) as again:
        assert again.key_bytes() == key


def test_closing_gives_it_to_the_next_and_twice_is_harmless(tmp_path):
    home = Home.open(tmp_path)
    home.close()
    home.close()
    Home.open(tmp_path).close()


def test_a_child_process_does_not_keep_the_lock(tmp_path):
    with Home.open(tmp_path):
        child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    try:
        Home.open(tmp_path).close()
    finally:
        child.communicate()


def test_reading_beside_a_running_peer_needs_no_lock_and_makes_nothing(home):
    home.remember(["/ip4/203.0.113.7/tcp/1"])
    before = files_in(home.path)
    with Home.open(home.path, exclusive=False) as reader:
        assert reader.address_book == ["/ip4/203.0.113.7/tcp/1"]
        assert reader.run_folder(RUN) == home.path / "runs" / RUN
    assert files_in(home.path) == before


def test_reading_where_there_is_no_home_is_an_error(tmp_path):
    with pytest.raises(HomeError, match="no home folder"):
        Home.open(tmp_path / "none", exclusive=False)
    assert not (tmp_path / "none").exists()


def test_a_file_in_place_of_the_folder_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(HomeError) as caught:
            Home.open(path)
        assert "is not a folder" in caught.value.why
        assert "--home" in caught.value.do


CANNOT_BE_WRITTEN = """
import os, sys
from swarm.errors import HomeError
from swarm.host.home import Home
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Home.open(sys.argv[1])
except HomeError as error:
    print(error); sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("below", ["", "home"])
def test_a_home_that_cannot_be_written_is_explained(tmp_path, below):
    folder = tmp_path / "closed"
    folder.mkdir()
    for path in (folder, *folder.parents):  # the other user must get there, and stop there
        if path.stat().st_uid == os.geteuid() and path != Path("/"):
            path.chmod(0o555 if path == folder else path.stat().st_mode | 0o011)
    done = in_another_process(CANNOT_BE_WRITTEN, folder / below)
    folder.chmod(0o755)
    if "No module named" in done.stderr:
        pytest.skip("the user without rights may not read this installation")
    assert done.returncode == 1, done.stderr
    assert "cannot use the home folder" in done.stdout
    assert "this user may not write there" in done.stdout
    assert "--home DIR" in done.stdout


def test_what_a_killed_peer_left_half_written_is_cleared(tmp_path):
    Home.open(tmp_path).close()
    (tmp_path / ".state.json.abc.tmp").write_text("{")
    (tmp_path / "mine.tmp").write_text("")
    Home.open(tmp_path).close()
    assert files_in(tmp_path) == ["lock", "mine.tmp"]


# --- identity


def test_the_key_is_made_once_for_its_owner_alone(home):
    key = home.key_bytes()
    assert len(key) == 32
    assert home.key_bytes() == key
    assert stat.S_IMODE((home.path / "identity.key").stat().st_mode) == 0o600
    assert (home.path / "identity.key").read_bytes() == key


def test_two_homes_have_two_keys(tmp_path):
    with Home.open(tmp_path / "a") as a, Home.open(tmp_path / "b") as b:
        assert a.key_bytes() != b.key_bytes()


@pytest.mark.parametrize("content", [b"", b"x" * 31, b"x" * 33, b"-----BEGIN PRIVATE KEY-----"])
def test_a_damaged_key_is_refused_and_left_as_it_is(home, content):
    path = home.path / "identity.key"
    path.write_bytes(content)
    with pytest.raises(HomeError) as caught:
        home.key_bytes()
    assert f"{len(content)} bytes" in caught.value.why
    assert path.read_bytes() == content


def test_a_key_that_others_could_read_is_closed_to_them_and_noted(home):
    key = home.key_bytes()
    (home.path / "identity.key").chmod(0o644)
    assert home.key_bytes() == key
    assert stat.S_IMODE((home.path / "identity.key").stat().st_mode) == 0o600
    assert "other users" in home.notes[0]


def test_a_key_that_is_a_folder_is_explained(home):
    (home.path / "identity.key").mkdir()
    with pytest.raises(HomeError, match="cannot read the identity"):
        home.key_bytes()


# --- what it remembers


def addresses(count, first=0):
    return [f"/ip4/203.0.113.7/tcp/{port}" for port in range(first + 1, first + count + 1)]


def test_addresses_are_kept_newest_first_without_repeats(tmp_path):
    a, b, c = addresses(3)
    with Home.open(tmp_path) as home:
        assert home.address_book == []
        home.remember([a, b])
        home.remember([c, a])
        assert home.address_book == [c, a, b]
    with Home.open(tmp_path) as home:
        assert home.address_book == [c, a, b]
        assert home.notes == []


def test_the_book_has_an_end_and_the_oldest_go(home):
    home.remember(addresses(150))
    home.remember(addresses(150, first=1000))
    assert len(home.address_book) == MAX_ADDRESSES == 200
    assert home.address_book == addresses(150, first=1000) + addresses(50)


@pytest.mark.parametrize("bad", ["", "tcp/1", "/ip4/1.2.3.4/tcp/1\n", "/\x1b[2J", "/" + "x" * 512, 7, None, "/\u00e9"])
def test_what_is_no_address_does_not_enter_the_book(home, bad):
    home.remember([bad, *addresses(1)])
    assert home.address_book == addresses(1)


def test_nothing_new_writes_nothing(home):
    home.remember(addresses(3))
    before = (home.path / "state.json").stat().st_mtime_ns, (home.path / "state.json").stat().st_ino
    home.remember(addresses(3))
    home.remember([])
    assert ((home.path / "state.json").stat().st_mtime_ns, (home.path / "state.json").stat().st_ino) == before


def test_the_caller_s_copy_of_the_book_is_its_own(home):
    home.remember(addresses(2))
    home.address_book.clear()
    assert home.address_book == addresses(2)


def test_port_and_run_are_remembered(tmp_path):
    with Home.open(tmp_path) as home:
        assert (home.listen_port, home.last_run_id) == (None, None)
        home.remember_listen_port(31337)
        home.remember_run(RUN)
    with Home.open(tmp_path) as home:
        assert (home.listen_port, home.last_run_id) == (31337, RUN)


def test_many_threads_lose_nothing(home):
    threads = [threading.Thread(target=home.remember, args=(addresses(10, first=10 * n),)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(home.address_book) == set(addresses(80))
    assert set(json.loads((home.path / "state.json").read_text())["address_book"]) == set(addresses(80))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"7"])
def test_a_damaged_state_is_ignored_with_a_note_and_written_anew(tmp_path, content):
    (tmp_path / "state.json").write_bytes(content)
    with Home.open(tmp_path) as home:
        assert "damaged and was ignored" in home.notes[0]
        assert home.address_book == []
        home.remember(addresses(1))
    with Home.open(tmp_path) as home:
        assert home.notes == []
        assert home.address_book == addresses(1)


def test_damage_in_one_part_spares_the_others(tmp_path):
    state = {"address_book": [1, *addresses(1), "x"], "listen_port": "80", "last_run_id": "../up", "else": 1}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with Home.open(tmp_path) as home:
        assert home.address_book == addresses(1)
        assert (home.listen_port, home.last_run_id) == (None, None)
        assert "no address in the address book" in home.notes[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50)
@given(state=st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)
       | st.dictionaries(st.sampled_from(["address_book", "listen_port", "last_run_id"]), inner)))  # fmt: skip
def test_no_state_keeps_a_peer_from_starting(tmp_path, state):
    (tmp_path / "state.json").write_text(json.dumps(state))
    with Home.open(tmp_path) as home:
        assert all(isinstance(maddr, str) for maddr in home.address_book)


def test_a_run_has_a_folder_of_its_own(home):
    folder = home.run_folder(RUN)
    assert folder == home.path / "runs" / RUN
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert home.run_folder(RUN) == folder


@pytest.mark.parametrize(
    "run_id",
    ["", ".", "..", "../etc-0123456789ab", "/tmp/x-0123456789ab", "demo", "demo-0123456789AB", f"{RUN}/..", f"{RUN}\n",
     "demo-0123456789ab0/x", "-0123456789ab", "a" * 41 + "-0123456789ab"],
)  # fmt: skip
def test_what_is_no_run_id_makes_no_folder(home, run_id):
    with pytest.raises(HomeError, match="is not a run id"):
        home.run_folder(run_id)
    with pytest.raises(HomeError, match="is not a run id"):
        home.remember_run(run_id)
    assert not (home.path / "runs").exists()


# --- writing


def test_a_file_is_replaced_whole_and_closed_to_others(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    atomic_write(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert files_in(tmp_path) == ["file"]


def test_a_file_in_a_folder_that_is_gone_is_a_stated_error(tmp_path):
    with pytest.raises(HomeError, match="cannot write"):
        atomic_write(tmp_path / "gone" / "file", b"x")


def test_a_folder_is_not_replaced_by_a_file(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(HomeError, match="cannot write"):
        atomic_write(tmp_path / "taken", b"x")
    assert files_in(tmp_path) == ["taken"]


FULL_DISK = """
import sys
from pathlib import Path
from swarm.errors import HomeError
from swarm.host.home import Home, atomic_write
path = Path(sys.argv[1])
if len(sys.argv) > 2:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
try:
    atomic_write(path, b"n" * 2_000_000)
except HomeError as error:
    print(error)
"""


def test_at_a_file_size_limit_the_old_file_stays_and_nothing_is_left_behind(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = in_another_process(FULL_DISK, path, 100_000, check=True)
    assert "the disk is full" in done.stdout and "make room" in done.stdout
    assert path.read_bytes() == b"old"
    assert files_in(tmp_path) == ["file"]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB of which a file of 300 kB is taken; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "swarm-test", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small disk here")
    (folder / "file").write_bytes(b"o" * 300_000)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_on_a_disk_that_is_really_full_the_old_file_stays_and_nothing_is_left_behind(small_disk):
    with pytest.raises(HomeError) as caught:
        atomic_write(small_disk / "file", b"n" * 2_000_000)
    assert "the disk is full" in caught.value.what
    assert (small_disk / "file").read_bytes() == b"o" * 300_000
    assert files_in(small_disk) == ["file"]


def test_on_a_full_disk_a_peer_keeps_in_memory_whom_it_met(small_disk):
    with Home.open(small_disk) as home:
        home.key_bytes()
        room = os.statvfs(small_disk)
        (small_disk / "filler").write_bytes(b"f" * (room.f_bavail * room.f_bsize))
        with pytest.raises(HomeError, match="the disk is full"):
            home.remember(addresses(20))
        assert home.address_book == addresses(20)
        (small_disk / "filler").unlink()
        home.remember([])  # nothing new, but something that is not on the disk yet
    with Home.open(small_disk) as home:
        assert home.address_book == addresses(20)


KILLED = """
import os, sys
from pathlib import Path
from swarm.host.home import atomic_write
print("ready", flush=True)
for n in range(100_000):
    atomic_write(Path(sys.argv[1]), bytes([65 + n % 26]) * 300_000)
"""


def test_a_kill_at_any_moment_leaves_one_version_whole(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, b"A" * 300_000)
    for _ in range(5):
        environ = {**os.environ, "PYTHONPATH": os.getcwd()}
        child = subprocess.Popen([sys.executable, "-c", KILLED, str(path)], stdout=subprocess.PIPE, env=environ)
        assert child.stdout is not None
        child.stdout.readline()
        before = path.stat().st_ino
        while path.stat().st_ino == before and child.poll() is None:
            pass
        child.kill()
        child.communicate()
        content = path.read_bytes()
        assert len(content) == 300_000
        assert len(set(content)) == 1


def test_limits_of_this_test_process_are_untouched():
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
