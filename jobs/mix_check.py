"""What mixers that train need of the settings, checked before anything expensive."""

from pathlib import Path

from curate.data.layout import RunFolder
from jobs.mix import mixer_for, mixture_output
from jobs.mix_passes import PASSES
from jobs.settings import Settings


def check_mix(settings: Settings) -> None:
    """Refuse a proxy's model that cannot be made and a target that is not there.

    It needs no index and writes nothing. Where the run has a mixture of this mixer, nothing is
    looked at: what has changed since is refused as the mixer begins.

    Raises:
        ConfigError: names the setting.
    """
    if not settings.mix:
        return
    name, mixer = mixer_for(settings)
    run = RunFolder(Path(settings.run).expanduser())
    if name not in PASSES or mixture_output(run, name).mark() is not None:
        return
    from jobs.proxy_refusals import check_proxy_model
    from jobs.sequences import check_mix_target

    check_proxy_model(mixer.proxy.model)
    if name in ("dga", "scalebio") or (name == "doge" and mixer.mode == "target"):
        check_mix_target(settings)
