"""What has gone wrong with a policy, by its figures: bounds for PPO's warnings, for --keep best, and for
the report."""
import sys

from tqdm import tqdm

from runtime.alarms import Alarm

VARIETY = 0.85  # the least distinct-2, as a share of the start's, or of SFT's
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 5e-2}  # of ratio_start and sampler_gap
HOPELESS = 5e-2  # a sampler_gap above this: the decoder's precision is given up
ALARMS = (
    Alarm("end_rate", lambda x, _: x == 0, "every reply is truncated: raise --reply_len or --end_penalty"),
    Alarm("eval_end_rate", lambda x, first: x < first - .1, "fewer replies end: raise --end_penalty"),
    Alarm("kl", lambda x, _: x > 20, "far from the reference: raise --kl_coef, or lower --policy_lr"),
    Alarm("kl_of_target", lambda x, _: not .5 < x < 1.5, "--kl_target is not held: change --kl_horizon, --kl_coef"),
    Alarm("entropy", lambda x, _: x < .1, "nothing is explored: raise --kl_coef or --entropy_coef"),
    Alarm("eval_distinct2", lambda x, first: x < VARIETY * first, "replies repeat: raise --kl_coef, lower --updates"),
    Alarm("value_loss", lambda x, first: x > 10 * first + 1, "the critic diverges: lower --critic_lr"))


def warn_of_gaps(metrics: dict[str, float], dtype: str, decoder_dtype: str, step: int) -> None:
    """A line on stderr for each metric that says that what is scored is not what was sampled. dtype: of
    the networks' products; decoder_dtype: of writing; step: updates done before."""
    for name, of in (("ratio_start", dtype), ("sampler_gap", decoder_dtype)):
        limit = max(TOLERANCE[dtype], TOLERANCE[of])
        if metrics.get(name, 0) > limit:
            tqdm.write(f"ppo: warning: {name} is {metrics[name]:.1e}, above {limit:g}, at update {step + 1}: what "
                       "is scored is not what was sampled", file=sys.stderr)
