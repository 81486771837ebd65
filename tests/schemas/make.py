"""Make kubernetes.json and tfjob.json from two published packages; README.md beside this file tells more.

python make.py kubernetes_validate-1.37.0-py3-none-any.whl kubeflow_training-1.9.4-py3-none-any.whl
"""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from typing import Any
from zipfile import ZipFile

VERSION = "1.33.0"  # the first in which backoffLimitPerIndex is stable
KINDS = (
    "io.k8s.api.batch.v1.Job",
    "io.k8s.api.core.v1.ConfigMap",
    "io.k8s.api.core.v1.PersistentVolumeClaim",
    "io.k8s.api.core.v1.PodTemplateSpec",
)
MODELS = "kubeflow/training/models/kubeflow_org_v1_{}.py"
SCALARS = {"str": "string", "int": "integer", "bool": "boolean"}
PREFIX = "#/$defs/"


def without_descriptions(schema: Any) -> Any:
    """The schema with references into its own file and no prose; a property may be called `description`."""
    if isinstance(schema, list):
        return [without_descriptions(value) for value in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if key != "description" or not isinstance(value, str)}
    if "$ref" in kept:
        return {"$ref": PREFIX + kept["$ref"].rpartition("/")[2]}
    return {key: without_descriptions(value) for key, value in kept.items() if not key.startswith("x-kubernetes")}


def references(schema: Any) -> set[str]:
    """The names of the definitions that a schema refers to."""
    if isinstance(schema, list):
        return set().union(*map(references, schema))
    if not isinstance(schema, dict):
        return set()
    own = {schema["$ref"].removeprefix(PREFIX)} if isinstance(schema.get("$ref"), str) else set()
    return own.union(*map(references, schema.values()))


def kubernetes(wheel: ZipFile) -> dict[str, Any]:
    """Name -> definition: of the kinds that the manifests have, and of all that they refer to."""
    path = f"kubernetes_validate/kubernetes-json-schema/v{VERSION}-local-strict/_definitions.json"
    published = json.loads(wheel.read(path))["$defs"]
    found: dict[str, Any] = {}
    names = set(KINDS)
    while names:
        found |= {name: without_descriptions(published[name]) for name in names}
        names = references(list(found.values())) - set(found)
    return found


def model(wheel: ZipFile, name: str) -> dict[str, Any]:
    """JSON schema of a class of Kubeflow's Python client, whose body is read and not run."""
    tree = ast.parse(wheel.read(MODELS.format(name)))
    (body,) = [node.body for node in tree.body if isinstance(node, ast.ClassDef)]
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Dict)
    }
    types, keys = tables["openapi_types"], tables["attribute_map"]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {keys[attribute]: of_type(kind) for attribute, kind in types.items()},
    }


def of_type(name: str) -> dict[str, Any]:
    """JSON schema of a type as the client writes it."""
    if name in SCALARS:
        return {"type": SCALARS[name]}
    if name.startswith("dict(str, "):
        return {"type": "object", "additionalProperties": of_type(name.removeprefix("dict(str, ").removesuffix(")"))}
    if name == "Quantity":
        return {"type": ["string", "number"]}
    if name.startswith("V1"):
        group = "apimachinery.pkg.apis.meta" if name == "V1ObjectMeta" else "api.core"
        return {"$ref": f"{PREFIX}io.k8s.{group}.v1.{name.removeprefix('V1')}"}
    return {"$ref": PREFIX + name}


def tfjob(wheel: ZipFile) -> dict[str, Any]:
    """Name -> definition of the TFJob; pod templates are Kubernetes' own, in the other file."""
    classes = {
        "KubeflowOrgV1TFJob": "tf_job",
        "KubeflowOrgV1TFJobSpec": "tf_job_spec",
        "KubeflowOrgV1RunPolicy": "run_policy",
        "KubeflowOrgV1SchedulingPolicy": "scheduling_policy",
        "KubeflowOrgV1ReplicaSpec": "replica_spec",
    }
    found = {name: model(wheel, file) for name, file in classes.items()}
    job = found["KubeflowOrgV1TFJob"]
    del job["properties"]["status"]  # the operator's
    job["properties"]["apiVersion"] = {"const": "kubeflow.org/v1"}
    job["properties"]["kind"] = {"const": "TFJob"}
    job["required"] = ["apiVersion", "kind", "metadata", "spec"]
    found["KubeflowOrgV1TFJobSpec"]["required"] = ["runPolicy", "tfReplicaSpecs"]  # what its constructor asks for
    return found


def main(kubernetes_wheel: str, kubeflow_wheel: str) -> None:
    folder = Path(__file__).parent
    for name, definitions in (
        ("kubernetes.json", kubernetes(ZipFile(kubernetes_wheel))),
        ("tfjob.json", tfjob(ZipFile(kubeflow_wheel))),
    ):
        text = json.dumps({"$defs": definitions}, sort_keys=True, separators=(",", ":"))
        (folder / name).write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
