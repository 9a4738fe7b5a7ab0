"""The launchers for many processes, with stand-ins for the interpreter, SLURM and the cloud."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from configs.default import get_config

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "common.sh")
MAIN = ["--config=configs/digits.py", "--config.data.path=two words"]
TPU = {"MF_TPU_PROJECT": "p", "MF_TPU_ZONE": "z", "MF_TPU_TYPE": "v5litepod-16"}
REMOTE = ["--config=configs/digits.py", "--workdir=gs://bucket/digits"]

PYTHON = f"""#!/usr/bin/env bash
case "$1 $2" in
  "-c "*) exec {sys.executable} "$@" ;;
  "-m pip") exit 0 ;;
esac
me=$JAX_PROCESS_ID
trap 'echo "TERM $me" >>"$RECORD/terms"' TERM
sleep 60 &
echo "$$ $!" >"$RECORD/pids_$me.new"
env | grep -E '^(JAX_|XLA_)' | sort >"$RECORD/env_$me"
echo "process $me: $*"
mv "$RECORD/pids_$me.new" "$RECORD/pids_$me"
case "$BEHAVIOUR$me" in
  fail1) until [ -e "$RECORD/pids_0" ]; do :; done; for i in {{1..30}}; do echo "line $i"; done; exit 7 ;;
  stop*)
    until [ -e "$RECORD/terms" ]; do read -r -t 0.05 <> <(:); done
    [ "$me" != 1 ] || /bin/sleep 2
    touch "$RECORD/saved_$me"
    exit 75
    ;;
  stuck* | fail*) while [ -e "$RECORD/venv" ]; do read -r -t 0.1 <> <(:); done ;;
esac
"""

GCLOUD = """#!/usr/bin/env bash
# A zone whose hosts are folders, where a command runs with the folder as its home.
cd "$CLOUD"
echo "$*" >>calls
argument() { local a; for a in "${@:2}"; do case "$a" in "$1="*) printf '%s' "${a#*=}" ;; esac; done; }
case "$4 $5" in
  "list "*) cat state 2>/dev/null || true ;;
  "create "*) echo ACTIVE >state; mkdir -p host0 host1 ;;
  "delete "*) rm -r state host0 host1 ;;
  "scp "*) for host in host0 host1; do cp "$5" "$host/${6#*:}"; done ;;
  "ssh "*)
    worker=$(argument --worker "$@") code=0
    for host in host0 host1; do
      [ "$worker" = all ] || [ "host$worker" = "$host" ] || continue
      (cd "$host" && HOME="$PWD" HOST="$host" bash -c "$(argument --command "$@")") || code=$?
    done
    exit "$code"
    ;;
esac
"""

UV = """#!/usr/bin/env bash
# Makes an environment whose interpreter does what $CLOUD/ends says of this start: end with a code (A/B: of host 0 and
# host 1), wait, or be preempted.
echo "uv $*" >>"$CLOUD/installations"
[ "$1" = venv ] || exit 0
mkdir -p "${!#}/bin"
cat >"${!#}/bin/python" <<'STUB'
#!/usr/bin/env bash
echo "$*" >>"$CLOUD/starts_$HOST"
end=$(sed -n "$(wc -l <"$CLOUD/starts_$HOST")p" "$CLOUD/ends")
[ "$HOST" = host0 ] && end=${end%/*} || end=${end#*/}
echo "said by $HOST"
[ "$end" != wait ] || while [ -e "$CLOUD/ends" ]; do sleep 1; done
if [ "$end" = preempted ]; then
  while [ "$(cat "$CLOUD"/starts_* | wc -l)" -lt "$((2 * $(wc -l <"$CLOUD/starts_$HOST")))" ]; do sleep 1; done
  echo SUSPENDED >"$CLOUD/state"
  exit 75
fi
exit "$end"
STUB
chmod +x "${!#}/bin/python"
"""


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a script with a stand-in interpreter; `fakes` are further programs by name."""
    venv = tmp_path / "venv"
    _program(venv / "bin" / "python", PYTHON)
    for stamp in (".installed", ".installed_cuda13"):
        shutil.copy(ROOT / "requirements.txt", venv / stamp)

    def begin(script, *arguments, fakes=(), **environment):
        for name, text in dict(fakes).items():
            _program(tmp_path / "bin" / name, text)
        path = {
            "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
            "MF_VENV": str(venv),
            "RECORD": str(tmp_path),
        }
        path["TMPDIR"] = str(tmp_path)
        return subprocess.Popen(
            ["bash", str(LAUNCH / script), *map(str, arguments)],
            env=path | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    yield begin
    shutil.rmtree(venv)  # whatever a failed test left behind ends


@pytest.fixture
def finish(start):
    """Return a function that runs a script to its end and returns (exit code, stdout, stderr)."""

    def run(*arguments, **more):
        process = start(*arguments, **more)
        out, errors = process.communicate(timeout=60)
        return process.returncode, out, errors

    return run


def _until(condition):
    limit = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < limit, "nothing happened for 30 s"
        time.sleep(0.02)
    return found


def _commands(out):
    return [shlex.split(line) for line in out.splitlines()]


# All of them


def test_scripts_have_no_findings_of_shellcheck():
    program = Path(sys.executable).parent / "shellcheck"
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    found = subprocess.run(
        [program, "-x", *map(str, scripts)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_prints_the_header_and_starts_nothing(finish, script):
    code, out, errors = finish(script, "--help", MF_VENV="/nowhere")
    header = (LAUNCH / script).read_text().split("\n# ")[1]
    assert (code, errors) == (0, "")
    assert out.splitlines()[0] == header.splitlines()[0]
    assert re.search(r"^Usage: ", out, re.MULTILINE)
    assert re.search(r"^Needs: ", out, re.MULTILINE)
    assert "SBATCH --" not in out
    assert "set -euo pipefail" in (LAUNCH / script).read_text()


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("local_processes.sh", "number of processes is missing"),
        ("local_processes.sh 0 --config=c", "'0'"),
        ("local_processes.sh 2x --config=c", "'2x'"),
        ("local_processes.sh 2 3 --config=c", "'3'"),
        ("local_processes.sh 2", "--config"),
        ("local_processes.sh 2 --config=c --devices-per-process=-1", "'-1'"),
        ("local_processes.sh 2 --config=c --logs=", "--logs"),
        ("local_processes.sh 2 --config c", "'--config'"),
        ("local_processes.sh 2 --config=c --dryrun", "'--dryrun'"),
        ("slurm.sh --dry-run", "--config"),
        ("slurm.sh --config=c", "not a SLURM job"),
        ("slurm.sh --config=c --nodes=2", "'--nodes=2'"),
        ("tpu_pod.sh", "action"),
        ("tpu_pod.sh start", "'start'"),
        ("tpu_pod.sh create --zone=", "--zone"),
        ("tpu_pod.sh create --project=p --zone=z", "--type"),
        ("tpu_pod.sh create --project=p --type=v6e-16", "--zone"),
        ("tpu_pod.sh create --zone=z --type=v6e-16", "--project"),
        ("tpu_pod.sh create --project=p --zone=z --type=v9-16", "--runtime"),
        ("tpu_pod.sh create --project=p --zone=z --type=v6e-16 --config=c", "--config=c"),
        (
            "tpu_pod.sh create --project=p --zone=z --type=v6e-16 --capacity=cheap",
            "--capacity=cheap",
        ),
        ("tpu_pod.sh status --project=p --zone=z --name=A", "--name=A"),
        ("tpu_pod.sh status --project=p --zone=z --poll=0", "--poll"),
        ("tpu_pod.sh status --project=p --zone=z --retries=x", "--retries"),
        ("tpu_pod.sh setup --project=p --zone=z --repo=r", "--commit"),
        ("tpu_pod.sh run --project=p --zone=z --workdir=/w", "--config"),
        ("tpu_pod.sh run --project=p --zone=z --config=c", "--workdir"),
        ("tpu_pod.sh run --project=p --zone=z --config=c --workdir=runs/c", "--workdir"),
        (
            "tpu_pod.sh follow --project=p --zone=z --type=v6e-16 --config=c --workdir=/w --spot",
            "--spot",
        ),
        ("detached.sh", "action"),
        ("detached.sh begin folder", "'begin'"),
        ("detached.sh start folder", "command"),
        ("detached.sh status", "folder"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_and_start_nothing(finish, tmp_path, command, named):
    fakes = dict.fromkeys(("gcloud", "srun"), "#!/bin/sh\ntouch $RECORD/started\n")
    code, out, errors = finish(*command.split(), fakes=fakes)
    assert (code, out, errors.count("\n")) == (2, "", 1)
    assert named in errors
    assert errors.startswith(command.split()[0] + ": ")
    assert not list(tmp_path.glob("started")) + list(tmp_path.glob("pids*"))


def test_setup_installs_the_build_for_the_accelerator_once(finish, tmp_path):
    calls = '#!/bin/sh\necho "$*" >>$RECORD/uv\n'
    for _ in range(2):
        code, _, errors = finish("setup.sh", fakes={"uv": calls}, MF_ACCELERATOR="tpu")
        assert (code, errors) == (0, "")
    (line,) = (tmp_path / "uv").read_text().splitlines()
    assert line.endswith(f"-r {ROOT}/requirements.txt jax[tpu] etils[epath-gcs]")
    code, out, errors = finish("setup.sh", MF_ACCELERATOR="gpu")
    assert (code, out) == (2, "")
    assert "MF_ACCELERATOR=gpu" in errors


# Several processes on this machine


def _pids(tmp_path, number):
    """Return the process ids of all stand-ins and of what each has started, once they are there."""
    paths = [tmp_path / f"pids_{i}" for i in range(number)]
    _until(lambda: all(path.exists() for path in paths))
    return [int(pid) for path in paths for pid in path.read_text().split()]


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _no_orphans(pids):
    _until(lambda: not any(map(_alive, pids)))


def test_processes_get_their_numbers_one_address_and_devices(finish, tmp_path):
    flags = ["--devices-per-process=4", f"--logs={tmp_path}/logs"]
    code, out, errors = finish("local_processes.sh", 3, *flags, *MAIN, XLA_FLAGS="--xla_a=1")
    assert (code, out) == (0, f"process 0: -m mf_jax.main {' '.join(MAIN)}\n")
    assert errors == f"processes 1 to 2 write to {tmp_path}/logs/process_*.log\n"
    found = [
        dict(line.split("=", 1) for line in (tmp_path / f"env_{i}").read_text().splitlines())
        for i in range(3)
    ]
    assert [each.pop("JAX_PROCESS_ID") for each in found] == ["0", "1", "2"]
    assert found[0] == found[1] == found[2]
    host, port = found[0].pop("JAX_COORDINATOR_ADDRESS").split(":")
    assert host == "127.0.0.1"
    assert 1024 <= int(port) < 65536
    assert found[0] == {
        "JAX_NUM_PROCESSES": "3",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_a=1 --xla_force_host_platform_device_count=4",
    }
    assert (tmp_path / "logs" / "process_2.log").read_text().startswith("process 2: -m mf_jax.main")
    _no_orphans(_pids(tmp_path, 3))


def test_without_a_number_of_devices_jax_is_left_to_choose(finish, tmp_path):
    assert finish("local_processes.sh", 1, *MAIN)[::2] == (0, "")
    names = [line.split("=")[0] for line in (tmp_path / "env_0").read_text().splitlines()]
    assert names == ["JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"]


def test_dry_run_prints_a_command_for_each_process(finish, tmp_path):
    code, out, errors = finish(
        "local_processes.sh", 2, "--dry-run", "--devices-per-process=2", *MAIN
    )
    assert (code, errors) == (0, "")
    run = [f"{tmp_path}/venv/bin/python", "-m", "mf_jax.main", *MAIN]
    common = [
        "JAX_NUM_PROCESSES=2",
        "XLA_FLAGS=--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS=cpu",
    ]
    assert _commands(out) == [
        ["env", "JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT", f"JAX_PROCESS_ID={i}", *common, *run]
        for i in range(2)
    ]
    assert not list(tmp_path.glob("pids*"))


def test_a_failure_shows_its_last_lines_and_ends_all_with_its_code(finish, tmp_path):
    code, _, errors = finish("local_processes.sh", 3, "--grace=1", *MAIN, BEHAVIOUR="fail")
    assert code == 7
    _, failure, where, *lines = errors.splitlines()
    assert failure == "process 1 of 3 ended with exit code 7"
    assert lines == [f"line {i}" for i in range(11, 31)]
    (log,) = re.findall(r"^the last lines of (\S+):$", where)
    assert Path(log).exists()
    _no_orphans(_pids(tmp_path, 3))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stop_goes_to_process_0_alone_and_all_may_end_by_themselves(start, tmp_path, name):
    process = start("local_processes.sh", 3, "--grace=1", *MAIN, BEHAVIOUR="stop")
    pids = _pids(tmp_path, 3)
    process.send_signal(getattr(signal, name))
    assert process.wait(timeout=30) == 75
    assert (tmp_path / "terms").read_text() == "TERM 0\n"
    assert (tmp_path / "saved_1").exists()  # though it took longer than a failure allows
    process.communicate()
    _no_orphans(pids)


def test_a_second_interrupt_leaves_no_orphan(start, tmp_path):
    process = start("local_processes.sh", 2, *MAIN, BEHAVIOUR="stuck")
    pids = _pids(tmp_path, 2)
    process.send_signal(signal.SIGINT)
    _until((tmp_path / "terms").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGKILL
    assert errors.splitlines()[1] == "process 0 of 2 ended with exit code 137"
    _no_orphans(pids)


# SLURM


@pytest.fixture
def job(tmp_path):
    """Return a function that runs slurm.sh as SLURM does: a copy that lies elsewhere."""

    def run(*arguments, code=0, **environment):
        spool = tmp_path / "spool" / "slurm_script"
        _program(spool, (LAUNCH / "slurm.sh").read_text())
        _program(tmp_path / "bin" / "srun", f'#!/bin/sh\necho "srun $*"\nexit {code}\n')
        _program(tmp_path / "bin" / "scontrol", '#!/bin/sh\necho "scontrol $*"\n')
        path = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "MF_VENV": str(tmp_path / "venv")}
        slurm = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "8"}
        return subprocess.run(
            ["bash", spool, *arguments],
            env=path | slurm | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (75, True), (7, False)])
def test_slurm_requeues_a_run_that_was_stopped_and_nothing_else(
    start, job, tmp_path, code, requeued
):
    done = job("--config=configs/digits.py", code=code, SLURM_CPUS_PER_TASK="8")
    srun = (
        f"srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task=8 {tmp_path}/venv/bin/python -m mf_jax.main"
        " --config=configs/digits.py --config.job.stopped_exit_code=75"
    )
    assert done.stdout.splitlines() == [srun] + ["scontrol requeue 12"] * requeued
    assert (done.returncode, done.stderr) == (code, "")


def test_slurm_needs_its_checkout_and_knows_gpus(start, job, tmp_path):
    done = job("--config=c", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n"), "submit from one" in done.stderr) == (
        2,
        1,
        True,
    )
    (tmp_path / "venv" / ".installed_cuda13").unlink()
    assert "jax[cuda13]" in job("--config=c").stdout
    assert "installing" not in job("--config=c", SLURM_GPUS_ON_NODE="0").stdout


def test_slurm_asks_for_a_signal_in_time_and_one_process_for_each_gpu():
    options = dict(
        re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (LAUNCH / "slurm.sh").read_text(), re.MULTILINE)
    )
    assert options["signal"] == "TERM@120"
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert {"requeue", "open-mode"} <= set(options)


def test_slurm_dry_run_prints_both_commands(finish, tmp_path):
    code, out, _ = finish("slurm.sh", "--dry-run", *MAIN)
    python = f"{tmp_path}/venv/bin/python"
    end = ["--config.job.stopped_exit_code=75"]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", python, "-m", "mf_jax.main", *MAIN, *end]
    assert (code, _commands(out)) == (0, [srun, ["scontrol", "requeue", "JOB_ID"]])


def test_keys_that_launchers_set_are_keys_of_the_config():
    text = "".join(path.read_text() for path in LAUNCH.glob("*.*"))
    keys = set(re.findall(r"--config\.job\.(\w+)=", text))
    assert "stopped_exit_code" in keys
    assert keys <= set(get_config().job)


# Detached


def test_a_detached_command_tells_how_it_went(finish, tmp_path):
    folder = tmp_path / "run"

    def status():
        return finish("detached.sh", "status", folder)[1].strip()

    assert status() == "none"
    until = f"for i in {{1..600}}; do [ ! -e {tmp_path}/$1 ] || break; sleep 0.05; done"
    wait = f"echo out; wait_for() {{ {until}; }}; wait_for end & wait_for go; exit 7"  # a child stays behind
    assert finish("detached.sh", "start", folder, "bash", "-c", wait) == (0, "", "")
    assert status() == "running"
    code, _, errors = finish("detached.sh", "start", folder, "true")
    assert (code, "runs in" in errors) == (1, True)
    (tmp_path / "go").touch()
    assert _until(lambda: (text := status()) != "running" and text) == "exited 7"
    assert (folder / "log").read_text() == "out\n"
    assert finish("detached.sh", "stop", folder)[0] == 1

    ready = f"trap 'exit 75' TERM; touch {tmp_path}/ready; for i in {{1..600}}; do sleep 0.05; done"
    assert finish("detached.sh", "start", folder, "bash", "-c", ready)[0] == 0
    _until((tmp_path / "ready").exists)
    assert finish("detached.sh", "stop", folder)[0] == 0
    assert _until(lambda: (text := status()) != "running" and text) == "exited 75"

    assert finish("detached.sh", "start", folder, "sleep", "60")[0] == 0
    pid = int((folder / "pid").read_text())
    hold = int(Path(f"/proc/{pid}/stat").read_text().split()[3])
    for each in (hold, pid):  # as in a power cut
        os.kill(each, signal.SIGKILL)
    assert _until(lambda: (text := status()) != "running" and text) == "lost"
    (tmp_path / "end").touch()


# A TPU pod


def _gcloud(*words):
    return ["gcloud", "compute", "tpus", *words]


WHERE = ["--project=p", "--zone=z", "--quiet"]
LOOK = _gcloud(
    "queued-resources", "list", *WHERE, "--filter=name~/n$", "--format=value(state.state)"
)


@pytest.mark.parametrize(
    ("flags", "runtime", "spot"),
    [
        ([], "v2-alpha-tpuv5-lite", ["--spot"]),
        (["--type=v6e-16", "--capacity=on-demand"], "v2-alpha-tpuv6e", []),
        (["--type=v4-32", "--runtime=mine"], "mine", ["--spot"]),
    ],
)
def test_tpu_create_asks_for_the_slice(finish, flags, runtime, spot):
    code, out, _ = finish("tpu_pod.sh", "create", "--dry-run", "--name=n", *flags, **TPU)
    kind = flags[0].removeprefix("--type=") if flags else TPU["MF_TPU_TYPE"]
    more = ["--node-id=n", f"--accelerator-type={kind}", f"--runtime-version={runtime}", *spot]
    assert (code, _commands(out)) == (
        0,
        [_gcloud("queued-resources", "create", "n", *WHERE, *more), LOOK],
    )


def _ssh(worker, command):
    return [*_gcloud("tpu-vm", "ssh", "n", *WHERE), f"--worker={worker}", f"--command={command}"]


def test_tpu_other_actions_print_their_commands(finish, tmp_path):
    def dry(action, *arguments):
        code, out, errors = finish("tpu_pod.sh", action, "--dry-run", "--name=n", *arguments, **TPU)
        assert (code, errors) == (0, "")
        return _commands(out)

    assert dry("delete") == [_gcloud("queued-resources", "delete", "n", *WHERE, "--force")]
    assert dry("log") == [_ssh(0, "tail -n 50 -F mf_jax/runs/latest/log")]
    assert dry("stop") == [
        _ssh(0, "bash mf_jax/checkout/launch/detached.sh stop mf_jax/runs/latest")
    ]
    look, hosts = dry("status")
    assert look == LOOK
    assert "--worker=all" in hosts
    archive = f"{tmp_path}/mf_jax_{os.getuid()}/n.tar.gz"
    parts = ["requirements.txt", "mf_jax", "configs", "launch"]
    assert dry("setup")[:3] == [
        ["mkdir", "-p", "-m", "700", str(Path(archive).parent)],
        ["tar", "-czf", archive, "-C", str(ROOT), "--exclude=__pycache__", *parts],
        [*_gcloud("tpu-vm", "scp", archive, "n:mf_jax.tar.gz", *WHERE), "--worker=all"],
    ]
    (clone,) = dry("setup", "--repo=https://example.org/mf jax.git", "--commit=abc")
    assert (
        "git clone --quiet 'https://example.org/mf jax.git' mf_jax/checkout && git -C " in clone[-1]
    )
    assert "checkout --quiet abc" in clone[-1]
    (run,) = dry("run", *MAIN, "--workdir=/shared/digits")
    assert run[-1].endswith("'--config.data.path=two words' --workdir=/shared/digits")
    follow = dry("follow", *REMOTE)
    assert [words[4] for words in follow if words[0] == "gcloud"] == [
        *("list", "delete", "create", "ssh", "scp", "ssh", "ssh")
    ]
    assert follow[-1][-1].endswith("--workdir=gs://bucket/digits --config.job.stopped_exit_code=75")


@pytest.fixture
def cloud(tmp_path, finish):
    """Return a function that runs an action of tpu_pod.sh in a zone of folders, where starts of a run end as given."""
    zone = tmp_path / "cloud"
    zone.mkdir()
    short = "#!/bin/sh\nexec /bin/sleep 0.05\n"

    def act(action, *arguments, ends=""):
        if ends:
            (zone / "ends").write_text(ends.replace(" ", "\n") + "\n")
        fakes = {"gcloud": GCLOUD, "uv": UV, "sleep": short}
        return zone, finish("tpu_pod.sh", action, *arguments, fakes=fakes, CLOUD=str(zone), **TPU)

    yield act
    (zone / "ends").unlink(missing_ok=True)


def _starts(zone):
    first, second = ((zone / f"starts_host{i}").read_text().splitlines() for i in range(2))
    assert first == second
    return len(first)


def _calls(zone, word):
    return sum(f" {word} " in line for line in (zone / "calls").read_text().splitlines())


def test_follow_survives_stops_preemptions_and_failures_until_the_run_is_finished(cloud):
    zone, (code, _, errors) = cloud("follow", "--retries=2", *REMOTE, ends="75 preempted 1/2 0")
    assert code == 0, errors
    assert (_starts(zone), _calls(zone, "create"), _calls(zone, "delete")) == (4, 2, 1)
    assert "SUSPENDED; deleting it" in errors
    assert "said by host1" in errors  # of the failure
    assert errors.endswith("finished\n")
    line = (zone / "starts_host0").read_text().splitlines()[0]
    assert line == "-m mf_jax.main " + " ".join(REMOTE) + " --config.job.stopped_exit_code=75"
    assert (zone / "host1" / "mf_jax" / "checkout" / "configs" / "digits.py").exists()
    assert "jax[tpu]" in (zone / "installations").read_text()

    cloud("follow", *REMOTE)  # a finished run is left alone, another is started
    assert _starts(zone) == 4
    cloud("follow", "--mode=eval", *REMOTE, ends="- - - - 0")
    assert _starts(zone) == 5
    assert "--mode=eval" in (zone / "starts_host0").read_text()


@pytest.mark.parametrize(("ends", "expected", "starts"), [("2 0", 2, 1), ("9 9 9 0", 9, 2)])
def test_follow_gives_up_on_bad_input_and_on_repeated_failures(cloud, ends, expected, starts):
    zone, (code, _, _) = cloud("follow", "--retries=2", *REMOTE, ends=ends)
    assert (code, _starts(zone)) == (expected, starts)
    # what ended it may be mended: the same command tries again
    assert (
        cloud("follow", "--retries=1", *REMOTE, ends="- - 0" if starts == 2 else "- 0")[1][0] == 0
    )


def test_a_pod_by_hand(cloud):
    assert cloud("create")[1][0] == 0
    assert cloud("setup")[1][0] == 0
    zone, (code, _, _) = cloud("run", *REMOTE, ends="wait")
    assert code == 0
    _, (_, out, _) = cloud("status")
    assert out.splitlines() == ["ACTIVE", "running", "running"]
    assert cloud("run", *REMOTE)[1][0] != 0
    assert cloud("stop")[1][0] == 0  # of host 0; the stand-in does not tell the others
    assert "exited 143" in _until(
        lambda: (out := cloud("status")[1][1]) and "exited" in out and out
    )
    pid = int((zone / "host1/mf_jax/runs/latest/pid").read_text())
    os.kill(pid, signal.SIGTERM)
    _until(lambda: not _alive(pid))
    assert cloud("delete")[1][0] == 0
    assert not (zone / "state").exists()


# GKE and Docker


def test_jobset_restarts_what_was_stopped_and_fits_its_slice():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert jobset["spec"]["network"] == {
        "enableDNSHostnames": True,
        "subdomain": jobset["metadata"]["name"],
    }
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert set(pod["nodeSelector"]) >= {
        f"cloud.google.com/gke-tpu-{part}" for part in ("accelerator", "topology")
    }
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"] == {
        "google.com/tpu": chips,
        "ephemeral-storage": "60Gi",
    }
    assert job["parallelism"] == job["completions"] == rows * columns / chips == 4
    assert (job["completionMode"], job["backoffLimit"], pod["restartPolicy"]) == (
        "Indexed",
        0,
        "Never",
    )
    assert pod["terminationGracePeriodSeconds"] >= 60

    values = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert set(values) >= {"config", "workdir"}
    assert all(values[key].startswith("gs://") for key in ("workdir", "config.data.path"))
    assert values["config.data.copy_to"].startswith("/"), "what a bucket's latents need"
    assert (ROOT / values["config"]).exists()
    assert values["config.job.stopped_exit_code"] == "75"
    (rule,) = job["podFailurePolicy"]["rules"]
    exits = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert rule == {"action": "FailJob", "onExitCodes": exits}
    policy = jobset["spec"]["failurePolicy"]
    assert policy["maxRestarts"] > 0
    (restart,) = policy["rules"]
    assert (restart["action"], restart["onJobFailureReasons"]) == (
        "FailJobSet",
        ["PodFailurePolicy"],
    )


def test_image_holds_what_it_copies_and_installs_the_requirements_first():
    lines = [
        line for line in (LAUNCH / "Dockerfile").read_text().splitlines() if line and line[0] != "#"
    ]
    steps = [line.split(None, 1) for line in lines]
    sources = [shlex.split(rest)[0] for name, rest in steps if name == "COPY"]
    assert sources == ["requirements.txt", "configs", "mf_jax"]
    assert all((ROOT / source).exists() for source in sources)
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {f"!{source}" for source in sources} <= set(ignored)
    order = [name for name, _ in steps]
    assert order.index("RUN") < lines.index("COPY mf_jax mf_jax")
    assert lines[order.index("RUN")].endswith(
        '-r requirements.txt "jax[$ACCELERATOR]" "etils[epath-gcs]"'
    )
    assert lines[order.index("RUN")].startswith("RUN pip install ")
    assert "ARG ACCELERATOR=cpu" in lines
    assert lines[order.index("USER")] == "USER 1000"
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "mf_jax.main"]'


# Their page


def _documented():
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/pods.md"))
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).replace(
        "\\\n", " "
    )
    return re.findall(
        r"^.*launch/(?:local_processes|tpu_pod|slurm|detached)\.sh.*$", blocks, re.MULTILINE
    )


@pytest.mark.parametrize("line", _documented())
def test_documented_commands_are_accepted(finish, line):
    words = shlex.split(line, comments=True)
    script = next(i for i, word in enumerate(words) if word.startswith("launch/"))
    code, out, errors = finish(Path(words[script]).name, *words[script + 1 :], "--dry-run", **TPU)
    assert (code, errors) == (0, "")
    assert out


def test_page_links_to_what_exists():
    for page in ("README.md", "docs/pods.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"
