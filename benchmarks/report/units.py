"""Numbers for people."""


def memory_text(count: float) -> str:
    """Bytes in MB or GB (powers of ten)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"


def seconds_text(seconds: float) -> str:
    """A length of time, exact enough to compare: ``0.05 s``, ``51.7 s``, ``12 min 05 s``, ``2 h 05 min``."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = round(seconds) // 60
    return f"{minutes} min {round(seconds) % 60:02d} s" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
