"""Pages that a reader pastes from, or looks a message up in, stay true."""

import ast
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml

import jaxopt_lab
from jaxopt_lab.train.arguments import parse_config
from tests.pages import DOCS, code_blocks

POD = "guide/tpu-pod.md"


def source_texts():
    """Every text in the package; what is filled in is …."""
    found = []
    for path in Path(jaxopt_lab.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "…" for x in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def quoted_messages():
    text = (DOCS / "guide/troubleshooting.md").read_text()
    checked = text.partition("## Starting")[2].partition("## What JAX")[0]
    return re.findall(r"^\| `([^`]+)` \|", checked, re.MULTILINE)


def test_every_quoted_message_is_said_somewhere():
    messages, texts = quoted_messages(), source_texts()
    assert len(messages) > 30
    missing = []
    for message in messages:
        parts = [part.strip() for part in message.split("…")]
        # A few letters one would find anywhere.
        assert max(map(len, parts)) >= 10, message
        missing += [f"{part} (of {message})" for part in parts if part not in texts]
    assert not missing, "\n".join(missing)


def commands(text):
    """The command lines of jaxopt-lab in a shell script, as words after the verb."""
    joined = text.replace("\\\n", " ")
    for line in joined.splitlines():
        if match := re.search(r"jaxopt-lab (pretrain|data prepare)( .*)?$", line.strip()):
            yield match[1], (match[2] or "").rstrip("'\"&;) ")


def test_commands_to_paste_are_understood():
    seen = 0
    for block in code_blocks(POD):
        for verb, rest in commands(block):
            words = shlex.split(re.sub(r"\$\{?\w+\}?", "1", rest.partition(">")[0]))
            parse_config(words, verb)
            seen += 1
    assert seen == 5


def test_scripts_to_paste_are_bash():
    for block in code_blocks(POD, language="sh"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
        assert not done.returncode and not done.stderr, f"{done.stderr}\n{block}"


def test_the_job_set_is_one():
    (text,) = code_blocks(POD, "kind: JobSet", "yaml")
    job_set = yaml.safe_load(text)
    (replicated,) = job_set["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    assert job["parallelism"] == job["completions"] and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert rule["onExitCodes"]["values"] == [2]  # a mistake does not get better
    # Four chips a host, and as many hosts as the topology has.
    selector = pod["nodeSelector"]
    width, height = map(int, selector["cloud.google.com/gke-tpu-topology"].split("x"))
    assert container["resources"]["limits"]["google.com/tpu"] == 4
    assert job["parallelism"] == width * height // 4
    program, verb, *words = container["command"]
    assert (program, verb) == ("jaxopt-lab", "pretrain")
    assert parse_config(words, verb).restartable


@pytest.mark.parametrize("page", ["guide/tpu-pod.md", "guide/troubleshooting.md"])
def test_pages_are_in_the_navigation(page):
    assert page in (DOCS.parent / "mkdocs.yml").read_text()
