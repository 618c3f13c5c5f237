"""A reader of text lines beside the codes: it sees its own part of the frame, live and in replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from edgekit.bundle import Bundle
from edgekit.runtime import Model
from edgekit.training import train

Cli = Callable[..., Any]
#: The lower third of the label.
LINE = {"top": 0.7, "left": 0.05, "right": 0.95}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """It reads badly: what counts is that it is asked about the right pixels."""
    return train(data="labels:lines,64", out=tmp_path_factory.mktemp("reader") / "r.edge", epochs=1, batch=32)


@pytest.fixture
def label(kit: Any) -> Any:
    """uint8 (H, W): a GS1 code above a line of text."""
    code = kit.code_picture("(01)09501101530003", "DataMatrix")[:200, :600]
    page = np.full((320, 640), 255, np.uint8)
    page[20 : 20 + code.shape[0], 20 : 20 + code.shape[1]] = code
    image = Image.fromarray(page)
    ImageDraw.Draw(image).text((60, 248), "(01)09501101530003", fill=0, font_size=40)
    return np.asarray(image)


def test_a_line_is_read_where_it_is_and_replayed(reader: Bundle, label: Any, cli: Cli, tmp_path: Path) -> None:
    (folder := tmp_path / "labels").mkdir()
    Image.fromarray(label).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"none")
    keys = "".join(f"{key} = {value}\n" for key, value in LINE.items())
    (file := tmp_path / "scan.toml").write_text(
        f'[codes]\n[region]\nbottom = 0.65\n[text]\nbundle = "{reader.path}"\n{keys}[crosscheck]\n'
        '[[source]]\naddress = "labels"\n[[sink]]\naddress = "jsonl:e.jsonl"\n'
        '[incidents]\nfolder = "incidents"\non = ["damaged"]\n'
    )
    assert cli("scan", "--check", file).code == 0
    assert cli("scan", file).code == 0
    event = json.loads((tmp_path / "e.jsonl").read_text().splitlines()[0])
    with Model.open(reader.path) as model:
        line, whole = model(label[224:320, 32:608]), model(label)
    assert (event["text"], event["text_score"]) == (line.text, round(line.score, 6))
    assert round(whole.score, 6) != event["text_score"]
    assert len(event["codes"]) == 1
    (incident,) = (tmp_path / "incidents").iterdir()
    replayed = cli("replay", incident, "--json")
    assert (replayed.code, replayed.json["differing"]) == (0, 0)
