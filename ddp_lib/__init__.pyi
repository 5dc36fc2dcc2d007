# The public names, each listed once: type checkers read this file, and so does __init__.py.
from .config import TrainConfig as TrainConfig
from .data.batch import make_batch as make_batch
from .data.dataset import load_dataset as load_dataset
from .data.sampler import SeededDataset as SeededDataset
from .data.sampler import TrainSampler as TrainSampler
from .data.sampler import eval_batches as eval_batches
from .distributed.world import World as World
from .errors import UserError as UserError
from .model import SimpleModel as SimpleModel
from .notebook.errors import RankError as RankError
from .notebook.run_nodes import run_nodes as run_nodes
from .notebook.run_ranks import run_ranks as run_ranks
from .processes.signals import StopSignal as StopSignal
from .report.plots import draw_run as draw_run
from .report.plots import rank_style as rank_style
from .report.watch import watch as watch
from .run_dir.checkpoint import Checkpoint as Checkpoint
from .run_dir.log import RunLog as RunLog
from .run_dir.log import read_run as read_run
from .train import fit as fit
from .training.ddp import check_replicas as check_replicas
from .training.ddp import share_buffers as share_buffers
from .training.ddp import warm_up as warm_up
from .training.ddp import wrap as wrap
from .training.evaluate import evaluate as evaluate
from .training.metrics import Metrics as Metrics

__version__: str
