"""What is inside a pack, in our words and in CycloneDX's."""

from __future__ import annotations

import json
import re
from pathlib import Path

import msgspec
import pytest

from edgekit.bundle import Bundle
from edgekit.deployment import pack, verify
from edgekit.errors import OutputExists


def test_the_list_of_what_is_inside(tmp_path: Path, tiny_bundle: Bundle, signed: Path, keys) -> None:
    out = tmp_path / "sbom" / "t.cdx.json"
    found = verify(signed, pub=keys.pub, sbom=out)
    graph = next(file for file in found["files"] if file["name"] == "model.onnx")
    assert graph["kind"] == "float graph"
    assert graph["producer"]["stage"] == tiny_bundle.manifest.history[0].stage
    bill = json.loads(out.read_text())
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", bill["serialNumber"])
    assert bill["metadata"]["component"]["hashes"] == [{"alg": "SHA-256", "content": found["pack_digest"]}]
    listed = {c["name"]: c["hashes"][0]["content"] for c in bill["components"] if "hashes" in c}
    assert listed == tiny_bundle.manifest.files
    with pytest.raises(OutputExists):
        verify(signed, pub=keys.pub, sbom=out)
    verify(signed, pub=keys.pub, sbom=tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_the_list_is_valid_cyclonedx(tmp_path: Path, tiny_bundle: Bundle, keys) -> None:
    validation = pytest.importorskip("cyclonedx.validation.json")
    from cyclonedx.schema import SchemaVersion

    bundle = tiny_bundle.extend(
        {"engines/t.engine": b"plan"}, tiny_bundle.entry("build", {"target": "t"}, {"tensorrt": "10.3.0"})
    )
    history = (*bundle.manifest.history, msgspec.structs.replace(bundle.manifest.history[0], figures={"data_digest": "d" * 64}))
    manifest = msgspec.structs.replace(bundle.manifest, history=history)
    from edgekit.deployment.inventory import write_sbom

    found = verify(pack(bundle, out=tmp_path / "x.zip", key=keys.key, expires="2099-01-01"), pub=keys.pub)
    assert next(f for f in found["files"] if f["kind"] == "engine")["producer"]["tensorrt"] == "10.3.0"
    write_sbom(tmp_path / "bom.json", manifest, found)
    text = (tmp_path / "bom.json").read_text()
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    wrong = text.replace('"SHA-256"', '"SHA-255"')
    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(wrong) is not None
