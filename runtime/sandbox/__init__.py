"""The hosts of a cluster file as network namespaces on one Linux machine."""

from heteromesh.runtime.sandbox.faults import Fault, parse_fault
from heteromesh.runtime.sandbox.machine import why_not
from heteromesh.runtime.sandbox.process import Process
from heteromesh.runtime.sandbox.sandbox import Sandbox, SandboxHost
from heteromesh.runtime.sandbox.supervise import SandboxJob

__all__ = ["Fault", "Process", "Sandbox", "SandboxHost", "SandboxJob", "parse_fault", "why_not"]
