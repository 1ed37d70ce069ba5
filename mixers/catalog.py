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
    "dga": "mixers.dga:DGA",
    "scalebio": "mixers.scalebio:ScaleBiO",
    "regmix": "mixers.regmix:RegMix",
    "dmo": "mixers.dmo:DMO",
    "loss_reweighting": "mixers.loss_reweighting:WeightsByLoss",
}
"""Name -> class: a frozen dataclass that is its own settings (see `mixers.protocol`)."""
