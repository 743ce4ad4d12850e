"""What PyTorch says of itself and of devices, as JSON: run in a process of its own, which may crash."""

import json


def facts() -> dict[str, object]:
    """Version, CUDA build, kernels for which architectures, and every device that it sees."""
    import torch

    devices = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        try:
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError:  # full, or another process's alone
            free = None
        capability = f"{properties.major}.{properties.minor}"
        devices.append({"name": properties.name, "memory": properties.total_memory, "free": free, "capability": capability})
    return {
        "version": torch.__version__,
        "cuda_build": torch.version.cuda,
        "cuda": bool(devices),
        "architectures": torch.cuda.get_arch_list() if devices else [],
        "devices": devices,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(facts()))
