"""The launch scripts, with stand-ins for the interpreter, SLURM and the cloud."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from fakes import ECHO, GCLOUD, INSTALLED, PYTHON, UV

LAUNCH = ROOT / "launch"
MAIN = ["--config=configs/digits.py", "--config.data.path=two words"]
TPU = {"MF_TPU_PROJECT": "p", "MF_TPU_ZONE": "z", "MF_TPU_TYPE": "v5litepod-16"}
REMOTE = ["--config=configs/digits.py", "--workdir=gs://bucket/digits"]


def _program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def start(tmp_path):
    """Return a function that starts a script with stand-ins for the interpreter and programs."""
    venv = tmp_path / "venv"
    _program(venv / "bin" / "python", PYTHON)
    for stamp in (".installed", ".installed_cuda13"):
        (venv / stamp).write_text(INSTALLED)
    path = {"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "MF_VENV": str(venv)}
    path |= {"RECORD": str(tmp_path), "TMPDIR": str(tmp_path)}

    def begin(script, *arguments, fakes=(), **environment):
        for name, text in dict(fakes).items():
            _program(tmp_path / "bin" / name, text)
        more = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        # bash cannot trap what was ignored when it started, as in the background of a shell
        more["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
        argv = ["bash", str(LAUNCH / script), *map(str, arguments)]
        return subprocess.Popen(argv, env=path | environment, **more)

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


@pytest.fixture
def dry(finish):
    """Return a function that returns the commands, as words, that a script would run."""

    def run(*arguments):
        code, out, errors = finish(*arguments, "--dry-run", **TPU)
        assert (code, errors) == (0, ""), arguments
        return [shlex.split(line) for line in out.splitlines()]

    return run


@pytest.fixture
def echo(tmp_path, finish):
    """Return a function that runs a script to its end with an interpreter that echoes."""
    _program(tmp_path / "venv" / "bin" / "python", ECHO)

    def run(*arguments):
        code, out, errors = finish(*arguments)
        return code, out.splitlines(), errors

    return run


def _until(condition):
    limit = time.monotonic() + 30
    while not (found := condition()):
        assert time.monotonic() < limit, "nothing happened for 30 s"
        time.sleep(0.02)
    return found


def test_scripts_have_no_findings_of_shellcheck():
    program = Path(sys.executable).parent / "shellcheck"
    scripts = [*LAUNCH.glob("*.sh"), ROOT / ".ci" / "run"]
    argv = [program, "-x", *map(str, scripts)]
    found = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


def test_help_prints_the_header_and_starts_nothing(finish):
    for path in set(LAUNCH.glob("*.sh")) - {LAUNCH / "common.sh"}:
        code, out, errors = finish(path.name, "--help", MF_VENV="/nowhere")
        assert (code, errors) == (0, "")
        assert out.splitlines()[0] == path.read_text().split("\n# ")[1].splitlines()[0]
        assert re.search(r"^Usage: .*^Needs: ", out, re.MULTILINE | re.DOTALL)
        assert "SBATCH --" not in out
        assert "set -euo pipefail" in path.read_text()


def test_bad_arguments_are_refused_in_one_line_and_start_nothing(finish, tmp_path):
    fakes = dict.fromkeys(("gcloud", "srun"), "#!/bin/sh\ntouch $RECORD/started\n")
    for command, named in (
        ("local_processes.sh 0 --config=c", "number of processes: '0'"),
        ("local_processes.sh 2", "--config"),
        ("local_processes.sh 2 --config=c --devices-per-process=-1", "'-1'"),
        ("local_processes.sh 2 --config=c --logs=", "--logs"),
        ("local_processes.sh 2 --config=c --dryrun", "'--dryrun'"),
        ("slurm.sh --config=c", "not a SLURM job"),
        ("tpu_pod.sh start", "'start'"),
        ("tpu_pod.sh create --project=p --zone=z", "--type"),
        ("tpu_pod.sh create --zone=z --type=v6e-16", "--project"),
        ("tpu_pod.sh create --project=p --zone=z --type=v9-16", "--runtime"),
        ("tpu_pod.sh create --project=p --zone=z --type=v6e-16 --config=c", "--config=c"),
        ("tpu_pod.sh status --project=p --zone=z --capacity=cheap", "--capacity=cheap"),
        ("tpu_pod.sh status --project=p --zone=z --name=A", "--name=A"),
        ("tpu_pod.sh status --project=p --zone=z --poll=0", "--poll"),
        ("tpu_pod.sh status --project=p --zone=z --retries=x", "--retries"),
        ("tpu_pod.sh setup --project=p --zone=z --repo=r", "--commit"),
        ("tpu_pod.sh run --project=p --zone=z --workdir=/w", "--config"),
        ("tpu_pod.sh run --project=p --zone=z --config=c --workdir=runs/c", "--workdir"),
        ("detached.sh begin folder", "'begin'"),
        ("detached.sh start folder", "command"),
    ):
        code, out, errors = finish(*command.split(), fakes=fakes)
        assert (code, out, errors.count("\n")) == (2, "", 1), command
        assert named in errors
        assert errors.startswith(command.split()[0] + ": ")
    assert not [*tmp_path.glob("started"), *tmp_path.glob("pids*")]


MODES = ("train", "eval", "sample")


def test_local_passes_arguments_to_the_modes_and_stops_where_one_fails(echo):
    """A config replaces the default; a mode that is given runs alone. Studies pass theirs on."""
    for name in ("ablations", "open_problems", "results"):
        line = f"python -m launch.{name} --document"
        assert echo(f"{name}.sh", "--document") == (0, [line], "")
    main = "python -m mf_jax.main --config=configs/"
    toy = ("--config=configs/toy2d.py", "--config.data.toy=two_moons")
    for arguments, code, lines in (
        ((), 0, [f"{main}digits.py --mode={mode}" for mode in MODES]),
        (toy, 0, [f"{main}toy2d.py {toy[1]} --mode={mode}" for mode in MODES]),
        (("--mode=sample",), 0, [f"{main}digits.py --mode=sample"]),
        (("--workdir=fail",), 7, [f"{main}digits.py --workdir=fail --mode=train"]),
    ):
        assert echo("local.sh", *arguments)[:2] == (code, lines)


def test_local_dry_run_prints_what_can_be_pasted_and_installs_nothing(echo, tmp_path):
    """Without it, an installation is announced and tried where requirements have changed."""
    (tmp_path / "venv" / ".installed").write_text("jax==0.1\n")
    main = f"{tmp_path}/venv/bin/python -m mf_jax.main --config=configs/digits.py"
    lines = [f"{main} '--workdir=runs/a b' --mode={mode}" for mode in MODES]
    assert echo("local.sh", "--dry-run", "--workdir=runs/a b") == (0, lines, "")
    _, lines, _ = echo("local.sh")
    assert "installing" in lines[0]
    assert any("pip install" in line for line in lines)


def test_sigterm_reaches_the_run_and_ends_the_script(echo, start):
    for name, *ended in (("wait", 0, "saved\n", ""), ("wait_full_disk", 1, "", "")):
        process = start("local.sh", f"--workdir={name}")
        assert [process.stdout.readline()[:6], process.stdout.readline()] == ["python", "waiting\n"]
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=30)
        assert [process.returncode, out, errors] == ended


def test_test_script_checks_style_passes_arguments_to_pytest_and_its_quick_tests_exist(echo):
    _, (*checks, tests), _ = echo("test.sh", "-k", "draws")
    assert checks == ["python -m ruff check .", "python -m ruff format --check ."]
    assert fnmatch(tests, "python -m pytest * -k draws")
    (names,) = re.findall(r"^quick=\((.*)\)$", (LAUNCH / "test.sh").read_text(), re.MULTILINE)
    assert all((ROOT / "tests" / f"test_{name}.py").exists() for name in names.split())


def test_setup_installs_the_build_for_the_accelerator_once(finish, tmp_path):
    calls = '#!/bin/sh\necho "$*" >>$RECORD/uv\n'
    for _ in range(2):
        code, _, errors = finish("setup.sh", fakes={"uv": calls}, MF_ACCELERATOR="tpu")
        assert (code, errors) == (0, "")
    (line,) = (tmp_path / "uv").read_text().splitlines()
    assert line.endswith(f"-r {ROOT}/requirements.txt -e {ROOT}[test] jax[tpu] etils[epath-gcs]")
    code, out, errors = finish("setup.sh", MF_ACCELERATOR="gpu")
    assert (code, out) == (2, "")
    assert "MF_ACCELERATOR=gpu" in errors


def _pids(tmp_path, number):
    """Return the process ids of all stand-ins and of what each has started, once they are there."""
    paths = [tmp_path / f"pids_{i}" for i in range(number)]
    _until(lambda: all(path.exists() for path in paths))
    return " ".join(path.read_text() for path in paths).split()


def _no_orphans(pids):
    """Wait until these have ended; Z is a process that has, and whose parent has not looked."""

    def is_alive(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except (FileNotFoundError, ProcessLookupError):
            return False

    _until(lambda: not any(map(is_alive, pids)))


def test_processes_get_their_numbers_one_address_and_devices(finish, tmp_path):
    flags = ["--devices-per-process=4", f"--logs={tmp_path}/logs"]
    code, out, errors = finish("local_processes.sh", 3, *flags, *MAIN, XLA_FLAGS="--xla_a=1")
    assert (code, out) == (0, f"process 0: -m mf_jax.main {' '.join(MAIN)}\n")
    assert errors == f"processes 1 to 2 write to {tmp_path}/logs/process_*.log\n"
    texts = [(tmp_path / f"env_{i}").read_text().splitlines() for i in range(3)]
    found = [dict(line.split("=", 1) for line in lines) for lines in texts]
    assert [each.pop("JAX_PROCESS_ID") for each in found] == ["0", "1", "2"]
    assert found[0] == found[1] == found[2]
    host, port = found[0].pop("JAX_COORDINATOR_ADDRESS").split(":")
    assert (host, 1024 <= int(port) < 65536) == ("127.0.0.1", True)
    flags = "--xla_a=1 --xla_force_host_platform_device_count=4"
    assert found[0] == {"JAX_NUM_PROCESSES": "3", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    assert (tmp_path / "logs" / "process_2.log").read_text().startswith("process 2: -m mf_jax.main")
    _no_orphans(_pids(tmp_path, 3))


def test_a_failure_shows_its_last_lines_and_ends_all_with_its_code(finish, tmp_path):
    code, _, errors = finish("local_processes.sh", 3, "--grace=1", *MAIN, BEHAVIOUR="fail")
    assert code == 7
    _, failure, where, *lines = errors.splitlines()
    assert failure == "process 1 of 3 ended with exit code 7"
    assert lines == [f"line {i}" for i in range(11, 31)]
    (log,) = re.findall(r"^the last lines of (\S+):$", where)
    assert Path(log).exists()
    _no_orphans(_pids(tmp_path, 3))


def test_a_stop_goes_to_process_0_alone_and_all_may_end_by_themselves(start, tmp_path):
    process = start("local_processes.sh", 3, "--grace=1", *MAIN, BEHAVIOUR="stop")
    pids = _pids(tmp_path, 3)
    process.send_signal(signal.SIGTERM)
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


@pytest.fixture
def job(tmp_path, finish):
    """Return a function that runs slurm.sh as SLURM does: a copy that lies elsewhere."""
    slurm = {"SLURM_JOB_ID": "12", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_GPUS_ON_NODE": "8"}
    spool, say = tmp_path / "spool" / "slurm_script", '#!/bin/sh\necho "${0##*/} $*"\nexit '
    _program(spool, (LAUNCH / "slurm.sh").read_text())

    def run(*arguments, code=0, **environment):
        fakes = {"srun": f"{say}{code}\n", "scontrol": f"{say}0\n"}
        return finish(spool, *arguments, fakes=fakes, **slurm | environment)

    return run


def test_slurm_requeues_a_run_that_was_stopped_and_needs_its_checkout(job, tmp_path):
    srun = (
        f"srun --kill-on-bad-exit=0 --wait=0 --cpus-per-task=8 {tmp_path}/venv/bin/python -m "
        "mf_jax.main --config=configs/digits.py --config.job.stopped_exit_code=75"
    )
    for expected in (0, 75, 7):
        cpus = {"SLURM_CPUS_PER_TASK": "8"}
        code, out, errors = job("--config=configs/digits.py", code=expected, **cpus)
        assert out.splitlines() == [srun] + ["scontrol requeue 12"] * (code == 75)
        assert (code, errors) == (expected, "")

    text = (LAUNCH / "slurm.sh").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert {"requeue", "open-mode", "signal"} <= set(options)
    code, _, errors = job("--config=c", SLURM_SUBMIT_DIR=str(tmp_path))
    assert (code, errors.count("\n"), "submit from one" in errors) == (2, 1, True)
    (tmp_path / "venv" / ".installed_cuda13").unlink()
    assert "installing" not in job("--config=c", SLURM_GPUS_ON_NODE="0")[1]
    assert "jax[cuda13]" in job("--config=c")[1]


def test_dry_runs_print_commands_for_a_shell(dry, tmp_path):
    run = [f"{tmp_path}/venv/bin/python", "-m", "mf_jax.main", *MAIN]
    srun = ["srun", "--kill-on-bad-exit=0", "--wait=0", *run, "--config.job.stopped_exit_code=75"]
    assert dry("slurm.sh", *MAIN) == [srun, ["scontrol", "requeue", "JOB_ID"]]
    env = "env JAX_COORDINATOR_ADDRESS=127.0.0.1:PORT JAX_PROCESS_ID={} JAX_NUM_PROCESSES=2"
    processes = dry("local_processes.sh", 2, *MAIN)  # JAX is left to choose the devices
    assert processes == [env.format(i).split() + run for i in (0, 1)]
    assert not list(tmp_path.glob("pids*"))


def test_a_detached_command_tells_how_it_went(finish, tmp_path):
    folder = tmp_path / "run"

    def status():
        return finish("detached.sh", "status", folder)[1].strip()

    assert status() == "none"
    # a child stays behind
    until = f"for i in {{1..600}}; do [ ! -e {tmp_path}/$1 ] || break; sleep 0.05; done"
    wait = f"echo out; wait_for() {{ {until}; }}; wait_for end & wait_for go; exit 7"
    assert finish("detached.sh", "start", folder, "bash", "-c", wait) == (0, "", "")
    assert status() == "running"
    (tmp_path / "go").touch()
    assert _until(lambda: (text := status()) != "running" and text) == "exited 7"
    assert (folder / "log").read_text() == "out\n"
    assert finish("detached.sh", "stop", folder)[0] == 1

    assert finish("detached.sh", "start", folder, "sleep", "60")[0] == 0
    pid = int((folder / "pid").read_text())
    hold = int(Path(f"/proc/{pid}/stat").read_text().split()[3])
    for each in (hold, pid):  # as in a power cut
        os.kill(each, signal.SIGKILL)
    assert _until(lambda: (text := status()) != "running" and text) == "lost"
    (tmp_path / "end").touch()


WHERE = ["--project=p", "--zone=z", "--quiet"]


def test_tpu_actions_print_their_commands(dry):
    pod = lambda action, *more: dry("tpu_pod.sh", action, "--name=n", *more)  # noqa: E731
    tpus, state = ["gcloud", "compute", "tpus"], "--format=value(state.state)"
    look = [*tpus, "queued-resources", "list", *WHERE, "--filter=name~/n$", state]
    for kind, flags, runtime, spot in (
        (TPU["MF_TPU_TYPE"], [], "v2-alpha-tpuv5-lite", ["--spot"]),
        ("v6e-16", ["--capacity=on-demand"], "v2-alpha-tpuv6e", []),
        ("v4-32", ["--runtime=mine"], "mine", ["--spot"]),
    ):
        more = ["--node-id=n", f"--accelerator-type={kind}", f"--runtime-version={runtime}", *spot]
        create = [*tpus, "queued-resources", "create", "n", *WHERE, *more]
        assert pod("create", f"--type={kind}", *flags) == [create, look]

    log = [*tpus, "tpu-vm", "ssh", "n", *WHERE, "--worker=0"]
    assert pod("log") == [[*log, "--command=tail -n 50 -F mf_jax/runs/latest/log"]]
    (clone,) = pod("setup", "--repo=https://example.org/mf jax.git", "--commit=abc")
    repo = "git clone --quiet -- 'https://example.org/mf jax.git' mf_jax/checkout && git -C "
    assert repo in clone[-1]
    assert "checkout --quiet abc" in clone[-1]
    (run,) = pod("run", *MAIN, "--workdir=/shared/digits")
    assert run[-1].endswith("'--config.data.path=two words' --workdir=/shared/digits")
    follow = pod("follow", *REMOTE)
    words = [words[4] for words in follow if words[0] == "gcloud"]
    assert words == ["list", "delete", "create", "ssh", "scp", "ssh", "ssh"]
    assert follow[-1][-1].endswith("--workdir=gs://bucket/digits --config.job.stopped_exit_code=75")


@pytest.fixture
def cloud(tmp_path, finish):
    """Return a function that runs an action of tpu_pod.sh in a zone of folders, with given ends."""
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


def test_follow_survives_stops_preemptions_and_failures_until_the_run_is_finished(cloud):
    zone, (code, _, errors) = cloud("follow", "--retries=2", *REMOTE, ends="75 preempted 1/2 0")
    assert code == 0, errors
    calls = (zone / "calls").read_text()
    assert (_starts(zone), calls.count(" create "), calls.count(" delete ")) == (4, 2, 1)
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


def test_follow_gives_up_on_bad_input_and_on_repeated_failures(cloud):
    zone, (code, _, _) = cloud("follow", "--retries=2", *REMOTE, ends="2 9 9 0")
    assert (code, _starts(zone)) == (2, 1)
    zone, (code, _, _) = cloud("follow", "--retries=2", *REMOTE)  # what ended it may be mended
    assert (code, _starts(zone)) == (9, 3)
    assert cloud("follow", "--retries=1", *REMOTE)[1][0] == 0


def test_a_pod_by_hand(cloud):
    assert cloud("create")[1][0] == 0
    assert cloud("setup")[1][0] == 0
    zone, (code, _, _) = cloud("run", *REMOTE, ends="wait")
    assert code == 0
    _, (_, out, _) = cloud("status")
    assert out.splitlines() == ["ACTIVE", "running", "running"]
    assert cloud("run", *REMOTE)[1][0] != 0
    assert cloud("stop")[1][0] == 0  # of host 0; the stand-in does not tell the others
    _until(lambda: "exited 143" in cloud("status")[1][1])
    pid = int((zone / "host1/mf_jax/runs/latest/pid").read_text())
    os.kill(pid, signal.SIGTERM)
    _no_orphans([pid])
    assert cloud("delete")[1][0] == 0
    assert not (zone / "state").exists()


def test_jobset_restarts_what_was_stopped_and_fits_its_slice():
    jobset = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    assert jobset["spec"]["network"]["subdomain"] == jobset["metadata"]["name"]
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    node = {key.rpartition("/")[2]: value for key, value in pod["nodeSelector"].items()}
    rows, columns = map(int, node["gke-tpu-topology"].split("x"))
    chips = container["resources"]["limits"]["google.com/tpu"]
    assert container["resources"]["requests"]["google.com/tpu"] == chips
    assert job["parallelism"] == job["completions"] == rows * columns / chips == 4
    assert (job["completionMode"], job["backoffLimit"]) == ("Indexed", 0)
    assert pod["restartPolicy"] == "Never"
    values = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert (ROOT / values["config"]).exists()
    assert all(values[key].startswith("gs://") for key in ("workdir", "config.data.path"))
    assert values["config.data.copy_to"].startswith("/"), "what a bucket's latents need"
    job_keys = {key.split(".")[2]: x for key, x in values.items() if ".job." in key}
    assert job_keys == {"stopped_exit_code": "75", "start_timeout_seconds": "1800"}
    (bad_input,) = job["podFailurePolicy"]["rules"]
    exits = {"containerName": container["name"], "operator": "In", "values": [2]}
    assert bad_input == {"action": "FailJob", "onExitCodes": exits}
    (rule,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_image_holds_what_it_copies_and_installs_the_requirements_first():
    text = (LAUNCH / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if line and line[0] != "#"]
    sources = [shlex.split(line)[1] for line in lines if line.startswith("COPY")]
    assert sources == ["launch/locks", "configs", "mf_jax"]
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    assert {"*", *(f"!{source}" for source in sources)} <= set(ignored)
    (install,) = (i for i, line in enumerate(lines) if line.startswith("RUN pip install "))
    assert lines[install].endswith('--require-hashes -r "locks/$ACCELERATOR.txt"')
    wanted = re.findall(r"^[\w.-]+", (ROOT / "requirements.txt").read_text().lower(), re.MULTILINE)
    for lock in (LAUNCH / "locks").iterdir():
        locked = lock.read_text().lower().splitlines()
        assert all(re.fullmatch(r"[\w.-]+==\S+ --hash=sha256:[0-9a-f]{64}", x) for x in locked)
        assert set(wanted) <= {line.split("==")[0] for line in locked}, f"run launch/lock.sh {lock}"
    assert install < lines.index("COPY mf_jax mf_jax")
    assert {"ARG ACCELERATOR=cpu", "USER 1000"} <= set(lines)
    assert lines[-1] == 'ENTRYPOINT ["python", "-m", "mf_jax.main"]'


def test_documented_commands_are_accepted(dry):
    text = "".join((ROOT / page).read_text() for page in ("README.md", "docs/pods.md"))
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    script = r"^.*launch/(?:local_processes|tpu_pod|slurm|detached)\.sh.*$"
    lines = re.findall(script, blocks.replace("\\\n", " "), re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        words = shlex.split(line, comments=True)
        i = next(i for i, word in enumerate(words) if word.startswith("launch/"))
        assert dry(Path(words[i]).name, *words[i + 1 :])
