"""`pascalvl doctor --report`: what is in it, and that nothing of it is personal."""

import os
import platform
import pwd
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pascalvl.engines import doctor
from pascalvl.engines.doctor import Diagnosis, Row, Section, State, computer
from pascalvl.engines.doctor.anonymous import anonymous
from pascalvl.engines.doctor.report import report
from pascalvl.plugins.bundle import Manifest
from pascalvl.runtime import bench
from pascalvl.runtime.cli import main

UUID = "GPU-1b2c3d4e-0123-4567-89ab-0123456789ab"
SMI = """#!/bin/sh
case "$*" in
*vbios_version*) echo 'Field "vbios_version" is not a valid field to query.'; exit 2;;
esac
for given; do case "$given" in --query-gpu=*) fields="${given#*=}";; esac; done
echo "$fields" | sed 's/^name/NVIDIA GeForce GTX 1080/; s/power.limit/180.00 W/; s/,/, /g'
echo 'Tesla P40, 6.1'
"""


@pytest.fixture
def alice(tmp_path, monkeypatch):
    """A user and a machine with names that a report must not have."""
    home = tmp_path / "alice smith"
    home.mkdir()
    account = pwd.struct_passwd(("asmith7", "x", os.getuid(), os.getgid(), "Alice Q. Smith,,,", str(home), "/bin/sh"))
    monkeypatch.setattr(pwd, "getpwuid", lambda _: account)
    monkeypatch.setattr(platform, "node", lambda: "wonderland.example.org")
    for name, value in {"HOME": home, "LOGNAME": "asmith7", "USER": "asmith7", "HOSTNAME": "rabbit-hole"}.items():
        monkeypatch.setenv(name, str(value))
    return home


def planted(home: Path) -> Diagnosis:
    """Rows with all that a message of some library may quote."""
    texts = [
        f"libx.so.3: {home}/.cache/pascalvl/kernels-0123456789abcdef/libpascalvl.so: cannot open shared object file",
        f"{home}/My Models/Qwen3|VL belongs to another user (asmith7), group Asmith7",
        "the folder /home/bob/things is missing; set LD_LIBRARY_PATH=/home/bob/lib:/opt/bob tools/lib64",
        f"file://{home}/photo.jpg, file:///home/bob/x.png",
        f"{UUID.upper()} {UUID[4:]} MIG-{UUID[4:]}, serial number 0324217045678, Serial: PG4-12AB, 0324217045678",
        "wonderland.example.org, WONDERLAND and rabbit-hole, of Alice Q. Smith, at 02:42:ac:11:00:02",
    ]
    rows = tuple(Row(f"row {number}", text, State.WARNING, f"{text}.") for number, text in enumerate(texts))
    verdict = f"nothing runs in {home}"
    return Diagnosis((Section("this machine", rows),), False, None, None, False, verdict, tuple(texts))


def test_nothing_personal(alice, monkeypatch):
    monkeypatch.chdir(alice)
    text = report(planted(alice))
    for secret in ("alice", "smith", "bob", "wonderland", "rabbit", "My Models", "02:42", "0324217045678", "12AB"):
        assert secret.lower() not in text.lower(), secret
    assert UUID[4:] not in text.lower()
    assert not re.search(r"(?<![\w…])/\w", text)
    # What is of use is still there.
    assert "libx.so.3: …/libpascalvl.so: cannot open shared object file" in text
    assert "[user]" in text
    assert "[host]" in text
    assert "[uuid]" in text


def test_what_is_no_secret_stays(alice):
    for text in (
        "pip install --extra-index-url https://pypi.nvidia.com tensorrt==8.6.1.post1 'nvidia-cudnn-cu12==8.9.*'",
        "10.16.1.11, 0.5 tok/s and 180 GB/s, and/or 1/2, 16 / 8, ~/.cache/pascalvl",
        "sources 0123456789abcdef, SHA-256 3e5228ae222b…",
        "1,048,576 pixels, 123456789 bytes",
    ):
        assert anonymous(text) == text
    assert anonymous("/usr/bin/g++ and") == "…/g++ and"
    assert anonymous("remove /a/b.json.") == "remove …/b.json."


def test_names_that_say_nothing_are_not_looked_for(alice, monkeypatch):
    """Else a report would be full of holes."""
    monkeypatch.setenv("USER", "cuda")
    monkeypatch.setenv("LOGNAME", "x")
    monkeypatch.setenv("HOSTNAME", "nvidia")
    text = "backend cuda, nvidia-smi, x and y, asmith7"
    assert anonymous(text) == "backend cuda, nvidia-smi, x and y, [user]"


def test_cards_by_nvidia_smi(tmp_path, monkeypatch):
    """A stand-in in its place that does not know a field, as some drivers' do not, and prints what it was asked."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    (gtx, tesla), problem = computer.find_cards()
    assert problem == ""
    assert (gtx["name"], gtx["power.limit"]) == ("NVIDIA GeForce GTX 1080", "180.00 W")
    assert tesla == {"name": "Tesla P40", "compute_cap": "6.1"}
    assert "vbios_version" not in gtx
    assert not [field for field in computer._CARD if re.search("uuid|serial|bus|board|inforom", field)]

    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not talk to the driver.'; exit 9\n")
    assert computer.find_cards() == (
        [],
        "nvidia-smi ends with code 9: NVIDIA-SMI has failed because it could not talk to the driver.",
    )
    monkeypatch.setenv("PATH", "")
    assert computer.find_cards() == ([], "nvidia-smi cannot be run (No such file or directory).")


def test_versions():
    found = computer.find_computer()
    assert found["Python"].endswith(platform.python_version())
    assert platform.release() in found["kernel"]
    assert re.fullmatch(r"glibc 2\.\d+", found["C library"])
    assert re.fullmatch(r"\d+\.\d GB", found["memory"])


def section(text: str, name: str) -> str:
    return text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_report_of_a_bundle(nano_engine_bundle, tmp_path, monkeypatch, capsys):
    short = bench.BenchOptions(depths=(0,), prefill=8, decode=2, follow_ups=(3,), picture=32, repeats=1)
    monkeypatch.setattr(bench, "SHORT_ON_CPU", short)
    file = tmp_path / "report.md"
    assert main(["doctor", "--engine", str(nano_engine_bundle), "--report", str(file)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "open an issue with it: README.md says where, under 'Measurements on your card'" in out.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["report.md"]
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# PascalVL report\n\nThe bundle, for backend onnxruntime, runs here, on the CPU.\n")
    assert f"| Python | {platform.python_implementation()} {platform.python_version()} |" in section(text, "Versions")
    assert f"| numpy | {doctor.facts.installed('numpy')} |" in section(text, "Versions")
    assert "### backend cuda" in section(text, "Doctor")
    manifest = Manifest.read(nano_engine_bundle, "engine")
    assert f"SHA-256 {manifest.source['sha256'][:12]}…" in section(text, "Bundle")
    assert f"{manifest.model.text.num_hidden_layers} layers" in section(text, "Bundle")
    for heading in ("prefill of 8, tok/s", "decode of 2, tok/s", "follow-up of 3, ms", "vision encoder, ms"):
        assert heading in section(text, "Figures")
    # All rows of a table have as many cells as its headings.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_report_of_a_machine_alone(tmp_path, capsys):
    file = tmp_path / "report.md"
    code = main(["doctor", "--report", str(file), "--json", "-"])
    out, err = capsys.readouterr()
    assert out.startswith("{\n")
    assert f"{file}: a report of this machine" in err
    text = file.read_text(encoding="utf-8")
    assert "## Bundle" not in text
    assert "## Figures" not in text
    assert ("\nNo backend runs on a GPU here; " in text) == (code == 1)


def test_a_bundle_that_cannot_be_measured(nano_engine_bundle, tmp_path, monkeypatch, capsys):
    file, other = tmp_path / "report.md", tmp_path / "engine"
    other.mkdir()
    for path in nano_engine_bundle.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    with open(other / "vision.onnx", "r+b") as damaged:
        damaged.write(b"\xff")
    main(["doctor", "--engine", str(other), "--report", str(file)])
    figures = section(file.read_text(encoding="utf-8"), "Figures")
    assert re.search(r"Not measured: …/vision\.onnx was altered", figures)


def test_a_report_is_there_whatever_becomes_of_the_figures(nano_engine_bundle, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", interrupted)
    file = tmp_path / "report.md"
    assert main(["doctor", "--engine", str(nano_engine_bundle), "--report", str(file)]) not in (0, 1)
    assert "Not measured: that did not come to its end." in section(file.read_text(encoding="utf-8"), "Figures")


def test_where_no_report_can_be_written(nano_engine_bundle, tmp_path, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("it was measured all the same")

    monkeypatch.setattr(bench, "measure", never)
    missing = tmp_path / "no" / "report.md"
    assert main(["doctor", "--engine", str(nano_engine_bundle), "--report", str(missing)]) == 2
    assert "cannot be read or written" in capsys.readouterr().err


def test_a_user_that_has_no_name(tmp_path):
    """As in a container that is run with some number."""
    script = (
        "import os, pwd\n"
        "def unknown(number): raise KeyError(number)\n"
        "pwd.getpwuid = unknown\n"
        "from pascalvl.engines.doctor.anonymous import anonymous\n"
        "print(anonymous('/home/bob/x of carol'))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME", "HOME")}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "[path] of carol\n"
