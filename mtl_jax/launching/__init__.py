"""Starting a run on several machines: the file that a system needs, from a template, and the command that starts it."""

from mtl_jax.launching.job import Job as Job
from mtl_jax.launching.job import LaunchFile as LaunchFile
from mtl_jax.launching.job import fill as fill
from mtl_jax.launching.systems import register_launcher as register_launcher
