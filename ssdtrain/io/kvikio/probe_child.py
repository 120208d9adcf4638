"""Run as a script by `probe`: prints what it finds as JSON, a line at a time, as any step may be the last.

Imports nothing of this package, so that it starts quickly: ``python probe_child.py DIRECTORY strict|lenient SECONDS``.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import sys
from typing import Any

_NBYTES = 1 << 20
_ALLOW_COMPAT_MODE, _FORCE_COMPAT_MODE = 1, 2  # CUFileBoolConfigParameter_t


def main(directory: str, mode: str) -> None:
    """Prints facts in the order in which each allows the next."""
    tell(
        directory=directory,
        file_system=file_system(directory),
        has_udev=os.path.isdir("/run/udev"),
        is_wsl="icrosoft" in os.uname().release,
        has_nvidia_fs=os.path.exists("/proc/driver/nvidia-fs") or os.path.exists("/sys/module/nvidia_fs"),
        compat_mode_variable=os.environ.get("KVIKIO_COMPAT_MODE", ""),
        cufile_json=cufile_json(),
        is_compat_forced=os.environ.get("CUFILE_FORCE_COMPAT_MODE", "").lower() in ("1", "true"),
    )
    tell(kvikio_error=failure_of(import_kvikio))
    tell(libcuda_error=failure_of(lambda: ctypes.CDLL("libcuda.so.1")))
    import kvikio.cufile_driver
    import kvikio.defaults

    tell(cufile_version=kvikio.cufile_driver.libcufile_version())
    is_posix_preferred = kvikio.defaults.is_compat_mode_preferred()
    tell(is_posix_preferred=is_posix_preferred)
    if not is_posix_preferred:
        tell(transfer=failure_of(lambda: transfer(directory, is_strict=mode == "strict")))


def tell(**facts: Any) -> None:
    """One line of output, at once."""
    print(json.dumps(facts), flush=True)


def failure_of(step: Any) -> str:
    """What went wrong; empty when nothing did."""
    try:
        step()
    except Exception as error:  # kvikio raises many types, and every failure is an answer
        return re.sub(r"^(KvikIO|cuFile|CUDA) \w+ at: \S+:\d+: ", "", str(error)) or type(error).__name__
    return ""


def import_kvikio() -> None:
    """Loads libkvikio and what it needs."""
    import kvikio  # noqa: F401


def file_system(directory: str) -> str:
    """Kind and device of the file system, as the kernel calls them."""
    path, best, found = os.path.realpath(directory), -1, "unknown"
    with open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            fields, _, rest = line.partition(" - ")
            point = fields.split()[4].replace("\\040", " ")
            is_inside = path == point or path.startswith(point.rstrip("/") + "/")
            if is_inside and len(point) >= best:
                kind, source = rest.split()[:2]
                best, found = len(point), f"{kind} on {source}"
    return found


def cufile_json() -> str:
    """The configuration file that cuFile would read; empty when there is none."""
    path = os.environ.get("CUFILE_ENV_PATH_JSON", "/etc/cufile.json")
    return path if os.path.exists(path) else ""


def transfer(directory: str, *, is_strict: bool) -> None:
    """Moves bytes from the device to a file and back through cuFile, which may fall back only if not `is_strict`."""
    import kvikio
    import kvikio.defaults

    if is_strict:
        forbid_compat_mode()
    mode = type(kvikio.defaults.get("compat_mode"))
    kvikio.defaults.set("compat_mode", mode.OFF)
    driver = open_driver()
    fd = os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    with kvikio.CuFile(f"/proc/self/fd/{fd}", "r+") as file:
        content = os.urandom(_NBYTES)
        array = device_array(driver, content)
        if file.pwrite(array, _NBYTES, 0, _NBYTES).get() != _NBYTES:
            raise OSError("a short write")
        back = device_array(driver, bytes(_NBYTES))
        if file.pread(back, _NBYTES, 0, _NBYTES).get() != _NBYTES:
            raise OSError("a short read")
        if content_of(driver, back) != content:
            raise OSError("other bytes came back than were written")


def forbid_compat_mode() -> None:
    """From here on a transfer past the host succeeds, or fails; to be called before cuFile's driver opens."""
    cufile = ctypes.CDLL("libcufile.so.0")
    is_forced = ctypes.c_bool()
    _check(cufile.cuFileGetParameterBool(_FORCE_COMPAT_MODE, ctypes.byref(is_forced)), "cuFileGetParameterBool")
    if is_forced:
        raise OSError("cuFile's setting force_compat_mode is on")
    _check(cufile.cuFileSetParameterBool(_ALLOW_COMPAT_MODE, ctypes.c_bool(False)), "cuFileSetParameterBool")


def _check(status: int, name: str) -> None:
    if status & 0xFFFFFFFF:  # the lower half of a CUfileError_t, returned in one register
        raise OSError(f"{name} failed with cuFile error {status & 0xFFFFFFFF}")


def open_driver() -> ctypes.CDLL:
    """The driver with a context on the first device."""
    driver = ctypes.CDLL("libcuda.so.1")
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for status in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), 0),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        driver.cuCtxPushCurrent_v2(context),
    ):
        if status:
            raise OSError(f"the driver cannot open a device: CUDA error {status}")
    return driver


class Array:
    """Device memory under the name that array libraries agreed upon."""

    def __init__(self, address: int) -> None:
        data = {"shape": (_NBYTES,), "typestr": "|u1", "data": (address, False), "version": 3}
        self.__cuda_array_interface__ = data


def device_array(driver: ctypes.CDLL, content: bytes) -> Array:
    """Device memory with this content, for the life of the process."""
    address = ctypes.c_size_t()
    status = driver.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(_NBYTES))
    status = status or driver.cuMemcpyHtoD_v2(address, content, ctypes.c_size_t(_NBYTES))
    if status:
        raise OSError(f"no device memory to try with: CUDA error {status}")
    return Array(address.value)


def content_of(driver: ctypes.CDLL, array: Array) -> bytes:
    """The bytes in device memory."""
    target = ctypes.create_string_buffer(_NBYTES)
    address = ctypes.c_size_t(array.__cuda_array_interface__["data"][0])  # type: ignore[index]
    driver.cuMemcpyDtoH_v2(target, address, ctypes.c_size_t(_NBYTES))
    return target.raw


if __name__ == "__main__":
    own = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [path for path in sys.path if path != own]  # its modules are not to be taken for others
    seconds = int(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    main(*sys.argv[1:3])
