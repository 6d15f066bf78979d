"""What of the processor decides how engines compute: its name, its vector instructions, and which of them are used."""

import os
import platform
from pathlib import Path

ISA = "ONEDNN_MAX_CPU_ISA"  # the variable by which oneDNN, and so OpenVINO and PyTorch, use fewer instructions
_FLAGS = ("sse4_2", "avx", "fma", "amx", "asimd", "i8mm", "sve")  # beginnings


def processor_facts() -> dict:
    """Return `cpu`, the processor's name, `cpu_flags`, those of its flags that say which vector instructions it has,
    and `max_isa`, what the environment limits them to (`None` if nothing does).

    Where the system tells nothing, there are no flags and the name is that of the kind of machine.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": sorted(flag for flag in flags if flag.startswith(_FLAGS)),
        "max_isa": os.environ.get(ISA),
    }


__all__ = ["ISA", "processor_facts"]
