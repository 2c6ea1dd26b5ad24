"""What `steer lens` and its commands say of themselves: one line, a description and examples for each."""

ABOUT = """\
What trained vectors do to their model. Begin with the report: it runs every analysis on one artifact and
writes a page that reads like a short paper.

    steer lens report my-vectors --out lens.html --figures lens/

The commands below are its parts, for a closer look. All of them take the model, the prompts and the template
from the artifact itself (the held-out problems of its run) unless told otherwise, print a short table, and
give everything as --json or as a figure with --plot FILE.
"""

CLOSING = """\
Whatever a command shows of the trained vectors, see what it shows of vectors of equal length that were not
trained for it: --control random, shuffled (each layer gets another layer's direction) or mean-difference.
"""

HELP = {
    "logit": (
        "tokens that each vector promotes and suppresses by itself",
        "Unembedding times vector: the tokens whose logits a vector raises (+) and lowers (-) when nothing "
        "is between it and the output. That is the whole story for the last layer; for early layers it "
        "says little.",
        "steer lens logit my-vectors --reading cosine --scripts --plot lens.png\n"
        "    steer lens logit my-vectors --jacobian smollm2.lens.safetensors",
    ),
    "jacobian": (
        "fit a Jacobian lens of a model, to read vectors of early layers with",
        "The mean derivative of the last layer's stream with respect to each layer's, over the positions of "
        "texts: `steer lens logit ARTIFACT --jacobian LENS` then shows the tokens that a vector promotes "
        "through the layers above it. Written after each batch of texts; the same command goes on where it "
        "was stopped. A backward pass for each number of the hidden size and each batch, to the earliest "
        "layer: later layers alone take less time.",
        "steer lens jacobian smollm2-135m-instruct --texts texts.txt --out smollm2.lens.safetensors",
    ),
    "shift": (
        "whose probability the vectors change, and where in the answer",
        "How far the next-token distributions of the steered and the base model lie apart, along answers "
        "that the steered model writes. With --opening, how much of the gain an opening gives that is forced "
        "upon the base model, without any vector.",
        "steer lens shift my-vectors --layers last\n"
        "    steer lens shift my-vectors --opening To --opening Step",
    ),
    "patch": (
        "which components the effect passes on its way to the output",
        "Path patching: the vectors' change may pass some components; all others give exactly what they give "
        "without it. 1 is the whole effect, 0 none of it; shares of routes need not add up to 1.",
        "steer lens patch my-vectors --layers 28 --solve\n"
        "    steer lens patch my-vectors --layers 28 --heads 29\n"
        "    steer lens patch my-vectors --layers 28 --heads 29 --qkv v\n"
        "    steer lens patch my-vectors --frozen --direction remove",
    ),
    "attention": (
        "how far attention maps move, beside random vectors",
        "Jensen-Shannon distance (0 equal, 1 disjoint) of the steered and the base model's attention maps, "
        "for each layer and head, along answers that the steered model writes; with random vectors of equal "
        "length beside it. Layers without attention maps are left out and named.",
        "steer lens attention my-vectors --problems 12 --plot attention.png",
    ),
    "persistence": (
        "whether the change survives the layers above",
        "Diff-Diff: cosine of each token's change of the stream with the mean change at that layer (near 1: "
        "one direction for all tokens). Diff-Vector: its cosine with the vector trained at that layer.",
        "steer lens persistence my-vectors --layers 0,10,20",
    ),
    "baselines": (
        "directions from activations alone, their length tuned, beside the vectors",
        "What a mean difference and the normal of a linear support vector machine add to the "
        "log-probability of the steered model's right answers, layer by layer and together, beside the "
        "trained vectors, whose length stays, and random directions. They lead from the base model's answers "
        "to the steered ones. Of every four problems two make the directions, one chooses each one's length, "
        "and one measures.",
        "steer lens baselines my-vectors --problems 64 --layers 4,12,20,28",
    ),
    "compose": (
        "single layers alone and in pairs; what leaving one out costs",
        "Greedy accuracy with one layer's vector, with two, and with all. The score of a pair is (pair - "
        "best of the two) / (all trained together - best of the two), undefined where the jointly trained "
        "set is not better than the best of the two. All pairs of n layers are n(n+1)/2 runs: choose with "
        "--layers. Of four pairs or more, Spearman's correlation of scores and gains with the cosine of the "
        "vectors and the distance of the layers.",
        "steer lens compose my-vectors --layers 0,8,16,24\n    steer lens compose my-vectors --leave-one-out",
    ),
    "sweep": (
        "accuracy over factors of the scale",
        "Greedy accuracy with all vectors multiplied: weaker, stronger, reversed.",
        "steer lens sweep my-vectors --scales -1 0 0.5 1 2",
    ),
    "scales": (
        "how much of an adaptive vector each token of a text gets",
        "The coefficient that each layer of an adaptive artifact gives to each token; the figure is a heat "
        "strip over the first text. The table has its spread over tokens, and how much of that is between "
        "types of tokens (digits, punctuation, ... of prompts and of answers). Any read-out varies over "
        "tokens: --control random-readout shows how much, on the same texts.",
        "steer lens scales my-adaptive-vectors --plot strip.png\n"
        "    steer lens scales my-adaptive-vectors --control random-readout --plot random.png",
    ),
    "directions": (
        "norms and cosines of the vectors, along checkpoints",
        "Of artifacts of one model, the earliest first: each layer's norm, and its cosine with the last "
        "artifact's vector.",
        "steer lens directions runs/demo/checkpoint-10 runs/demo/checkpoint-20 runs/demo/vectors",
    ),
    "transfer": (
        "the vectors of several models in each of the others",
        "Accuracy of every artifact's vectors in every other one's model, and the published score, (donor's "
        "- base) / (own - base), with random vectors of the own ones' length beside it. The problems are "
        "those of the first artifact's run, and answers may be as long as the longest limit of the runs.",
        "steer lens transfer vectors-of-one vectors-of-another",
    ),
    "conventions": (
        "logit lens and Diff-Diff as the published code has them, beside ours",
        "Two analyses, each by the conventions of steer and by those of the paper's code. Logit lens: with "
        "the final norm's gain, or without it by dot product and by cosine. Diff-Diff: one mean change over "
        "all texts, the first token left out; or each text's own mean, the first token included, along what "
        "each vector writes alone. Random vectors are beside both.",
        "steer lens conventions my-vectors --layers 0,10,20 --problems 8 --draws 3",
    ),
    "downstream": (
        "tokens that each single vector promotes by way of all later layers",
        "The mean change of the last layer's state, one vector on at a time, through the final norm's gain "
        "and the unembedding. agreement: 1 where all tokens' states change alike; peak: the top token's "
        "score in standard deviations; overlap: the top tokens that `steer lens logit` has too. In "
        "brackets the mean of random vectors.",
        "steer lens downstream my-vectors --layers 0,10,20 --problems 8",
    ),
    "entropy": (
        "whether the vectors act at uncertain or at certain tokens",
        "The entropy of the base model's next-token distribution against how far the vectors move it, token "
        "by token along the steered model's answers: Spearman's correlation, beside that of random sets of "
        "vectors, which also move uncertain tokens more.",
        "steer lens entropy my-vectors --layers last --problems 8",
    ),
    "spectrum": (
        "singular values and stable rank of the set of vectors",
        "Whether the layers' vectors are one direction (stable rank 1) or many, as trained and divided by "
        "the length of the residual stream at their layer, beside random sets of equal length.",
        "steer lens spectrum my-vectors",
    ),
    "features": (
        "features of a sparse autoencoder that the vectors write and read",
        "Cosine and projection of a vector on the rows of the SAE's decoder (what it writes), its cosine "
        "with the rows of the encoder (what it reads), and how the mean activation of each feature changes "
        "on texts while the vectors are on. Random vectors of equal length are beside each number; p is how "
        "often the strongest feature of random vectors is as strong. A vector at the SAE's own layer and "
        "site is read as it is. Vectors in earlier places are read by the mean change that arrives at the "
        "SAE; those after it are refused. Texts: --texts; else the steered model's answers to --data or "
        "the held-out problems of the vectors' run; of vectors that no run trained, a neutral text.",
        "steer lens features my-vectors --sae runs/sae-demo/topk --plot features.png\n"
        "    steer lens features my-vectors --sae gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_medium",
    ),
    "report": (
        "everything, as one self-contained HTML page",
        "Runs every analysis beside 20 sets of random vectors, judges the paper's findings by stated rules "
        "(seen, seen but not specific, not seen, untestable), and writes one page. Needs 24 problems; "
        "what is said of gains, 24 that are solved. A quarter of an hour for a model of 135M parameters "
        "on two CPU cores; it shows where it is.",
        "steer lens report runs/demo/vectors --out lens.html --figures lens/",
    ),
}
