"""Names of the mixers; imported only when chosen."""

MIXERS: dict[str, str] = {
    "natural": "mixers.natural:Natural",
    "uniform": "mixers.natural:Uniform",
    "temperature": "mixers.temperature:Temperature",
    "unimax": "mixers.unimax:UniMax",
    "cooldown": "mixers.cooldown:Cooldown",
    "fixed": "mixers.fixed:Fixed",
    "doremi": "mixers.doremi:DoReMi",
    "doge": "mixers.doge:DoGE",
    "scalebio": "mixers.scalebio:ScaleBiO",
    "regmix": "mixers.regmix:RegMix",
}
"""Name -> class: a frozen dataclass that is its own settings (see `mixers.protocol`)."""
