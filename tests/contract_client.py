# SPDX-License-Identifier: Apache-2.0
"""Uses a client that openapi-python-client has made from the agent's document, as a user's script does: its types are
those of the API, each operation is there, and it talks to an agent over both of its sockets.

Usage: contract_client.py SOCKET URL TOKEN, with the client in the module portcullis_client"""

import importlib
import json
import sys
import typing

import httpx
from portcullis_client import AuthenticatedClient, Client, models
from portcullis_client.api.policy import events
from portcullis_client.api.vms import create_vm, delete_vm, get_vm, list_vms, patch_vm
from portcullis_client.models import BootSpec, Event, ListVm, Problem, ProblemCode, Vm, VmPatch, VmSpec, VmState

socket, url, token = sys.argv[1:]


def members(model):
    """The types of a model's members."""
    scope = {**vars(models), **vars(importlib.import_module(model.__module__))}
    return typing.get_type_hints(model, scope, {name: getattr(models, name) for name in dir(models)})


def check_types():
    vm = members(Vm)
    assert (vm["name"], vm["spec"], vm["status"]) == (str, VmSpec, models.VmStatus), vm
    assert members(models.VmStatus)["state"] is VmState
    assert members(ListVm)["items"] == list[Vm], members(ListVm)
    for name in ("Decision", "Pf", "Port", "PortGroup", "Switch", "Vf"):
        assert members(getattr(models, f"List{name}"))["items"] == list[getattr(models, name)], name
    event = members(Event)
    assert event["event"] is models.EventName, event
    for member, model in {"vm": models.Owner, "object_": models.Subject, "decision": models.Decision}.items():
        assert model in typing.get_args(event[member]), (member, event[member])
    assert members(Problem)["code"] is ProblemCode
    # What is written out in place of a reference is a type for each place.
    doubles = [name for name in dir(models) if name.startswith("List") and "Item" in name]
    assert not doubles, doubles


def check_operations():
    with open("resources/openapi.json", encoding="utf-8") as file:
        document = json.load(file)
    count = 0
    for path in document["paths"].values():
        for operation in path.values():
            name, tag = operation["operationId"], operation["tags"][0]
            module = importlib.import_module(f"portcullis_client.api.{tag}.{name}")
            answer = str(typing.get_type_hints(module.sync, {**vars(module)})["return"])
            assert "Problem" in answer, (name, answer)
            count += 1
    assert count >= 30, count


def check_use(client):
    spec = VmSpec(name="client1", memory="64MiB", boot=BootSpec(kernel="vmlinuz"))
    made = create_vm.sync(client=client, body=spec)
    assert isinstance(made, Vm) and made.status.state is VmState.DEFINED and made.spec.cpus == 1, made
    listed = list_vms.sync(client=client)
    assert isinstance(listed, ListVm) and made.id in [vm.id for vm in listed.items], listed
    changed = patch_vm.sync("client1", client=client, body=VmPatch(memory="128MiB"))
    assert isinstance(changed, Vm) and changed.spec.memory == "128MiB", changed

    # An event of before: the stream begins after the one that is named.
    request = {"method": "get", "url": "/v1/events", "headers": {"last-event-id": "1"}}
    with client.get_httpx_client().stream(**request) as stream:
        data = next(line for line in stream.iter_lines() if line.startswith("data:"))
    event = Event.from_dict(json.loads(data.removeprefix("data:")))
    assert isinstance(event.event, models.EventName) and event.id > 0, event

    taken = create_vm.sync(client=client, body=spec)
    assert isinstance(taken, Problem) and (taken.status, taken.code) == (409, ProblemCode.NAME_TAKEN), taken
    wrong = create_vm.sync(client=client, body=VmSpec(name="b", memory="1MiB", boot=BootSpec(kernel="k")))
    assert isinstance(wrong, Problem) and (wrong.code, wrong.field) == (ProblemCode.INVALID_REQUEST, "memory"), wrong
    assert delete_vm.sync("client1", client=client) is None
    gone = get_vm.sync("client1", client=client)
    assert isinstance(gone, Problem) and gone.code is ProblemCode.NOT_FOUND, gone


check_types()
check_operations()
transport = httpx.HTTPTransport(uds=socket)
check_use(Client(base_url="http://localhost", httpx_args={"transport": transport}))
check_use(AuthenticatedClient(base_url=url, token=token))
stranger = list_vms.sync(client=Client(base_url=url))
assert isinstance(stranger, Problem) and stranger.code is ProblemCode.UNAUTHORIZED, stranger
assert callable(events.sync)
print("The generated client works.")
