"""The words of task `reviews`: subjects, openings, and the vocabulary of both polarities.

Written for this project. An opening says nothing about liking, so that the completion alone has a
sentiment; a subject is singular, so that `it` and `was` fit everywhere.
"""

from dataclasses import dataclass
from typing import Literal

Polarity = Literal["positive", "negative"]


@dataclass(frozen=True)
class Category:
    """A kind of thing that people review, with the verb for what they do with it."""

    noun: str
    verb: tuple[str, str, str, str]
    """To do, did, done, doing: `take, took, taken, taking`."""
    names: tuple[str, ...]
    aspects: tuple[str, ...]
    """Singular, with article: `the pacing`."""
    plural_aspects: tuple[str, ...]
    details: tuple[str, ...]
    """When or where, of no polarity: `in the last twenty minutes`."""


CATEGORIES = (
    Category(
        "film",
        ("watch", "watched", "watched", "watching"),
        ("The Salt Road", "Nine Lanterns", "Harbour Street", "A Map of Rain", "Winter Signal", "The Glass Orchard"),
        (
            "the pacing", "the soundtrack", "the camera work", "the script", "the ending", "the casting",
            "the lighting",
        ),
        ("the performances", "the subtitles", "the costumes", "the crowd scenes"),
        (
            "in the last twenty minutes", "during the long train scene", "once the story left the village",
            "whenever the two brothers were on screen", "after the interval", "until the screen went dark",
        ),
    ),
    Category(
        "book",
        ("read", "read", "read", "reading"),
        (
            "The Ninth Lighthouse", "Paper Rivers", "The Clockmaker's Daughter-in-Law", "Eleven Doors", "Saltmarsh",
            "The Understudy",
        ),
        (
            "the prose", "the plot", "the dialogue", "the narrator", "the final chapter", "the translation",
            "the setting",
        ),
        ("the characters", "the short chapters", "the letters", "the flashbacks"),
        (
            "in the first fifty pages", "halfway through part two", "once the family moved north",
            "in the courtroom chapters", "from the prologue onwards", "on every other page",
        ),
    ),
    Category(
        "restaurant",
        ("visit", "visited", "visited", "visiting"),
        ("Juniper Table", "The Blue Ladle", "Casa Mirta", "Number Forty", "Tamarind Lane", "The Old Bakehouse"),
        ("the soup", "the service", "the bread", "the wine list", "the fish", "the noise level", "the dessert"),
        ("the portions", "the noodles", "the waiters", "the side dishes"),
        (
            "between the starter and the main course", "at the corner table", "after nine in the evening",
            "by the open kitchen", "when the second plate arrived", "over three courses",
        ),
    ),
    Category(
        "hotel",
        ("visit", "visited", "visited", "visiting"),
        ("the Marlow Inn", "Hotel Brandt", "the Lindholm", "Casa Verde", "the Station House", "the Pavilion Hotel"),
        ("the breakfast", "the bed", "the view", "the front desk", "the bathroom", "the location", "the heating"),
        ("the rooms", "the towels", "the corridors", "the staff"),
        (
            "on the fourth floor", "during our second night", "at six in the morning", "beside the lifts",
            "from check-in to check-out", "in the room facing the courtyard",
        ),
    ),
    Category(
        "phone",
        ("use", "used", "used", "using"),
        ("the Orbin 5", "the Kestrel Mini", "the Tavo X2", "the Lumen Fold", "the Parallel 8", "the Pico Slate"),
        (
            "the battery life", "the camera", "the screen", "the keyboard", "the fingerprint reader", "the case",
            "the charging speed",
        ),
        ("the speakers", "the menus", "the buttons", "the photographs"),
        (
            "in direct sunlight", "after four days without a charger", "on long calls", "while I was travelling",
            "with the latest update installed", "at the lowest brightness",
        ),
    ),
    Category(
        "app",
        ("use", "used", "used", "using"),
        ("Tidepool", "Ledgerly", "Fernnote", "Routewise", "Pantry Clock", "Halfstep"),
        (
            "the layout", "the search", "the setup", "the calendar view", "the start page", "the syncing",
            "the dark mode",
        ),
        ("the reminders", "the weekly reports", "the icons", "the settings"),
        (
            "on my tablet", "after the spring update", "with more than one account", "on a slow connection",
            "in the paid version", "on the very first screen",
        ),
    ),
    Category(
        "course",
        ("take", "took", "taken", "taking"),
        (
            "Statistics from Scratch", "Drawing in Twelve Weeks", "Bookkeeping Basics", "Conversational Portuguese",
            "Introduction to Soil", "The Short Essay",
        ),
        (
            "the pace", "the reading list", "the feedback", "the final project", "the lecturer", "the workload",
            "the discussion board",
        ),
        ("the exercises", "the recorded lectures", "the handouts", "the quizzes"),
        (
            "in week four", "from the second module on", "during the group sessions", "once the homework began",
            "in the live tutorials", "near the end of term",
        ),
    ),
    Category(
        "headset",
        ("use", "used", "used", "using"),
        ("the Aurel H3", "the Quiet Fold", "the Bramble One", "the Nordtone", "the Studio Wren", "the Halo 40"),
        (
            "the bass", "the weight", "the microphone", "the mute button", "the cable", "the carrying case",
            "the headband",
        ),
        ("the ear pads", "the controls", "the high notes", "the hinges"),
        (
            "on a crowded train", "during long meetings", "after an hour of wear", "with the volume turned up",
            "in a room full of people", "on two overnight flights",
        ),
    ),
    Category(
        "museum",
        ("visit", "visited", "visited", "visiting"),
        (
            "the Museum of Bridges", "the Tidewater Gallery", "the Old Mint", "the Textile House",
            "the Railway Collection", "the Museum of Maps",
        ),
        (
            "the audio guide", "the main hall", "the lighting", "the café", "the temporary exhibition", "the signage",
            "the shop",
        ),
        ("the labels", "the guides", "the display cases", "the upper galleries"),
        (
            "on the upper floor", "in the east wing", "shortly before closing time", "with two children in tow",
            "around the old steam engine", "in the room of drawings",
        ),
    ),
    Category(
        "concert",
        ("attend", "attended", "attended", "attending"),
        ("Riverlight", "Harvest Night", "Northfield Sounds", "the Lantern Evening", "Quayside", "Hillside Live"),
        (
            "the line-up", "the sound", "the organisation", "the seating", "the main stage", "the signposting",
            "the atmosphere",
        ),
        ("the food stalls", "the two encores", "the queues", "the solo pieces"),
        (
            "in the second half", "near the river stage", "after the rain came through", "between the afternoon sets",
            "at the main gate", "late in the evening",
        ),
    ),
    Category(
        "coffee maker",
        ("use", "used", "used", "using"),
        (
            "the Bellini Drip", "the Morning Nine", "the Kettle & Co. Brewer", "the Solo Press", "the Ferro 2",
            "the Slow Pour",
        ),
        (
            "the coffee", "the milk foam", "the timer", "the water tank", "the grinder", "the manual",
            "the cleaning cycle",
        ),
        ("the filters", "the temperature settings", "the small parts", "the dials"),
        (
            "before six in the morning", "with cheap supermarket beans", "after two weeks of daily use",
            "when four people wanted a cup", "at the coarsest setting", "on the kitchen counter",
        ),
    ),
    Category(
        "bicycle",
        ("ride", "rode", "ridden", "riding"),
        (
            "the Corvid City", "the Alder 7", "the Tern Lane", "the Marathon Step", "the Valley Tourer",
            "the Fold & Go",
        ),
        (
            "the saddle", "the steering", "the frame", "the gear shifting", "the paintwork", "the chain guard",
            "the folding mechanism",
        ),
        ("the brakes", "the tyres", "the pedals", "the lights"),
        (
            "on wet cobblestones", "uphill with a full basket", "over thirty kilometres", "on the forest path",
            "in city traffic", "against the wind",
        ),
    ),
    Category(
        "podcast",
        ("follow", "followed", "followed", "following"),
        ("Second Platform", "The Ledger", "Small Hours", "Field Recordings", "The Long Table", "Borrowed Time"),
        (
            "the editing", "the host", "the research", "the music", "the sound design", "the storytelling",
            "the format",
        ),
        ("the interviews", "the guests", "the episodes", "the short stories"),
        (
            "in the third episode", "during the archive segments", "after the opening theme", "over a whole season",
            "in the long conversation with the farmer", "on my walk to the office",
        ),
    ),
)  # fmt: skip

TIMES = (
    "last weekend", "last month", "two weeks ago", "on a rainy Tuesday", "in early March", "one Sunday afternoon",
    "during the summer break", "in late October", "in June", "on my day off", "over the long weekend",
    "late one evening",
)  # fmt: skip

PEOPLE = (
    "my sister", "two colleagues", "my neighbour", "a cousin of mine", "my flatmate", "an old classmate",
    "my parents", "my brother", "my neighbours", "my daughter", "my dentist", "my aunt",
)  # fmt: skip

SOURCES = (
    "a newspaper column", "a newsletter", "a magazine", "an online forum", "the Sunday paper", "a radio programme",
    "a blog", "a mailing list",
)  # fmt: skip

OPENINGS = (
    "I {did} {name} {time} because {person} kept talking about it.",
    "{time}, I {did} {name} together with {person}, after months of waiting.",
    "{person} mentioned {name} to me {time}, so I decided to {do} it myself.",
    "I had heard about {name} from {source} before I {did} it {time}.",
    "I had meant to {do} {name} ever since {person} brought it up.",
    "This is my review of {name}, a(n) {noun} that I {did} {time}.",
    "{person} and I {did} {name} {time}, and these are my notes.",
    "It was {person} who first brought up {name}, and I finally {did} it {time}.",
    "Before I {did} {name}, I had met this {noun} only in {source}.",
    "We had talked about {name} over dinner, and {time} I {did} it on my own.",
    "For this review I {did} {name} twice, once by myself and once with {person}.",
    "After {doing} {name} {time}, I sat down and wrote this review.",
    "I {did} {name} {time} knowing only a paragraph in {source}.",
    "A paragraph in {source} led me to {name}, which I {did} {time}.",
    "Many people have reviewed {name}; I {did} it {time} and here is mine.",
    "My notes on {name} begin {time}, when {person} and I {did} it together.",
    "{person} had {done} {name} a year before I {did} it {time}.",
    "I am writing about {name}, the {noun} that {person} and I {did} {time}.",
    "Some background first: I {did} {name} {time}, and {person} did the same.",
    "It took me until now to {do} {name}, although {source} covered it long ago.",
    "Here is what I noticed when I {did} {name} {time} alongside {person}.",
    "When {person} asked about {name}, I had {done} it only once, {time}.",
    "Between two appointments {time}, I {did} {name} and made some notes.",
    "The first time I {did} {name} was {time}, before I moved to this town.",
    "{name} came up in a conversation with {person}, and I {did} it {time}.",
    "I {did} {name} {time} after {person} had {done} it twice.",
    "{source} ran a short piece on {name}, and I {did} it {time}.",
    "I set aside some hours {time} to {do} {name}, a(n) {noun} picked by {person}.",
    "As someone who rarely reviews a(n) {noun}, I {did} {name} {time} and took notes.",
    "My turn to review a(n) {noun} came {time}, and I picked {name} from a list.",
    "{time}, {person} and I compared notes on {name}, which we had both {done}.",
    "I first heard of {name} on the bus, and I {did} it {time}.",
    "None of my colleagues had {done} {name}, so {time} I {did} it.",
    "It has been a while since I {did} {name}, the {noun} described in {source}.",
    "For this I went back to my notes from when I {did} {name} {time}.",
    "It was raining, so I {did} {name} instead of driving out to see {person}.",
    "I {did} {name} {time}, as did everyone else in my street.",
    "There was a photograph of {name} in {source}, and I {did} it {time}.",
    "The {noun} I am about to discuss is {name}, which I {did} {time}.",
    "I wrote {name} on my list {time} and {did} it eleven days later.",
    "On the way home I told {person} that I had just {done} {name}.",
    "I had a few hours to myself {time}, so I decided to {do} {name}.",
    "You asked me about {name}, so here is my account of {doing} it {time}.",
    "I {did} {name} for the second time {time}, and {person} had questions about it.",
    "For anyone who is thinking about {name}: I {did} it {time} with {person}.",
    "Having {done} one other {noun} this year, I {did} {name} {time} to compare.",
    "In the end it was {name} that we chose {time}, and I {did} it first.",
    "{time}, I thought again about {name}, the {noun} from {source}.",
)

ADVERBS = (
    "really", "wholly", "quite", "remarkably", "exceedingly", "thoroughly", "consistently", "undeniably",
    "altogether", "unusually", "simply", "genuinely", "rather", "plainly", "entirely", "downright", "noticeably",
    "strikingly", "uncommonly", "unexpectedly", "extremely", "particularly", "distinctly", "decidedly",
)  # fmt: skip

PLAIN = (
    "ordinary", "average", "plain", "typical", "standard", "familiar", "unremarkable", "middling", "conventional",
    "much as described", "neither here nor there", "about what I had expected", "much the same as the others",
    "what the brochure said", "nothing out of the ordinary", "roughly as before", "in line with the description",
    "of the usual sort",
)  # fmt: skip

WORDS: dict[Polarity, dict[str, tuple[str, ...]]] = {
    "positive": {
        "adjective": (
            "superb", "wonderful", "delightful", "excellent", "impressive", "lovely", "terrific", "brilliant",
            "outstanding", "fantastic", "pleasant", "great", "good", "polished", "thoughtful", "memorable",
            "satisfying", "remarkable", "splendid", "amazing", "admirable", "beautiful", "marvellous", "first-rate",
            "exceptional", "faultless", "charming", "perfect", "refreshing", "well judged", "magnificent", "inspired",
        ),
        "manner": (
            "beautifully", "gracefully", "superbly", "brilliantly", "carefully", "wonderfully", "skilfully",
            "smoothly", "elegantly", "perfectly", "splendidly", "thoughtfully", "neatly", "confidently", "generously",
            "expertly", "charmingly", "flawlessly", "admirably", "warmly", "cleverly", "lovingly", "impressively",
            "excellently", "marvellously", "delightfully",
        ),
        "moved": (
            "delighted", "impressed", "charmed", "thrilled", "pleased", "amused", "captivated", "enchanted",
            "satisfied", "inspired", "encouraged", "cheered", "fascinated", "rewarded", "comforted", "reassured",
            "amazed", "dazzled", "soothed", "excited", "entertained", "heartened", "refreshed", "gladdened",
            "enthralled", "uplifted",
        ),
        "liked": (
            "loved", "enjoyed", "admired", "adored", "appreciated", "treasured", "applauded", "praised", "valued",
            "relished", "welcomed", "cherished",
        ),
        "feeling": (
            "happy", "grateful", "cheerful", "glad", "content", "full of energy", "hopeful", "smiling", "elated",
            "delighted", "full of joy", "calm and pleased",
        ),
        "verdict": (
            "I would gladly {do} it again tomorrow",
            "I have already told three friends to {do} it",
            "it was worth every penny",
            "it deserves all the praise it gets",
            "I am happy to recommend it to anyone",
            "I could not stop smiling on the way home",
            "this is how a(n) {noun} ought to be",
            "I have rarely had so much fun with a(n) {noun}",
            "it is an easy five stars from me",
            "I am looking forward to the next time",
            "we talked about it with pleasure for days",
            "it has become a favourite in our house",
            "whoever made it has my thanks and respect",
            "do yourself a favour and {do} it soon",
            "it was the best thing about my week",
            "I treasure the memory already",
            "even my grumpy uncle had a wonderful time",
            "it made an ordinary day special",
            "no other {noun} has given me such joy",
            "I cannot praise it enough",
        ),
    },
    "negative": {
        "adjective": (
            "dreadful", "poor", "disappointing", "terrible", "awful", "dull", "frustrating", "careless", "sloppy",
            "weak", "horrible", "annoying", "tedious", "shoddy", "irritating", "miserable", "lousy", "lifeless",
            "unpleasant", "inferior", "mediocre", "pitiful", "dismal", "useless", "flawed", "clumsy", "dreary",
            "appalling", "unbearable", "pathetic", "badly judged", "bad",
        ),
        "manner": (
            "badly", "poorly", "carelessly", "clumsily", "terribly", "horribly", "awkwardly", "lazily", "hastily",
            "sloppily", "miserably", "dreadfully", "thoughtlessly", "pathetically", "crudely", "ineptly", "abysmally",
            "awfully", "roughly", "haphazardly", "cheaply", "grudgingly", "unevenly", "shabbily", "incompetently",
            "dismally",
        ),
        "moved": (
            "disappointed", "annoyed", "bored", "frustrated", "irritated", "exhausted", "disgusted", "infuriated",
            "upset", "bothered", "saddened", "confused", "discouraged", "angered", "baffled", "depressed",
            "embarrassed", "disturbed", "troubled", "exasperated", "dispirited", "worried", "offended", "appalled",
            "deflated", "dismayed",
        ),
        "liked": (
            "hated", "disliked", "resented", "detested", "loathed", "regretted", "dreaded", "despised", "deplored",
            "cursed", "distrusted", "endured",
        ),
        "feeling": (
            "sad", "angry", "tired", "annoyed", "bored", "out of sorts", "gloomy", "unhappy", "irritable", "worn out",
            "miserable", "cold and disappointed",
        ),
        "verdict": (
            "I would never {do} it again",
            "I have already warned three friends about it",
            "it was a waste of money",
            "it deserves all the criticism it gets",
            "I am sorry to say that I cannot recommend it",
            "I complained about it all the way home",
            "this is how a(n) {noun} ends up with a bad name",
            "I have rarely been so bored by a(n) {noun}",
            "it is a miserable one star from me",
            "I am dreading the next time",
            "we argued about the lost money for days",
            "it has become a sad joke in our house",
            "whoever made it should be ashamed",
            "save yourself the trouble and {do} anything else",
            "it was the worst thing about my week",
            "I am trying to forget this failure already",
            "even my cheerful uncle had a terrible time",
            "it ruined an ordinary day",
            "no other {noun} has left me so angry",
            "I cannot warn people enough",
        ),
    },
}  # fmt: skip

MADE = ("handled", "done", "put together", "arranged", "planned", "thought out", "managed", "worked out")  # fmt: skip
"""What people did with an aspect; after an adverb of manner."""

# Slots without a side take the polarity of the sentence; `other_` ones the opposite.
OPINIONS = (
    "{aspect} {was} {adjective}, and {aspect} {was} {adjective} too",
    "{aspect} {was} {adverb} {adjective} {detail}",
    "{detail}, {aspect} {moved} me more than I can say",
    "I found {aspect} {adjective} and {aspect} {adjective}",
    "what stayed with me {detail} was how {adjective} {aspect} {was}",
    "{aspect} seemed {adjective} from the start, as if {manner} {made} by a single person",
    "as a(n) {noun} it was {adjective}, and above all {aspect} {moved} me",
    "{person} thought {aspect} {was} {adjective}, and I have to say the same",
    "few things this year have {moved} me as much as {aspect}",
    "{aspect} {was} {manner} {made}, and it showed {detail}",
    "{detail}, I kept thinking how {adjective} {aspect} {was}",
    "{aspect} {moved} {person}, while {aspect} {moved} me",
    "there was something {adjective} about {aspect}, especially {detail}",
    "I {liked} {aspect}, and I {liked} {aspect} even more",
    "my notes say that {aspect} {was} {adjective}, underlined twice",
    "by the end, {aspect} had {moved} all of us",
    "{aspect} turned out {adjective}, while {aspect} felt {adjective}",
    "nobody had told me how {adjective} {aspect} would be {detail}",
    "for the price, {aspect} {was} {adverb} {adjective}",
    "compared with the last {noun} I {did}, {aspect} {was} {adjective}",
    "{aspect} alone made the whole thing {adjective} for me",
    "everyone in our group called {aspect} {adjective}, and {person} {liked} {aspect}",
    "I could go on about {aspect}, which {moved} me {detail}",
    "the people behind it had {manner} {made} {aspect}, and I {liked} that",
    "{adverb} {adjective} is the only way to describe {aspect}",
    "if I had to name one thing, it would be {aspect}, so {adjective} {detail}",
    "the longer it went on, the more {aspect} {moved} me",
    "I came away with one thought, namely that {aspect} {was} {adjective}",
    "{detail}, {aspect} went from ordinary to {adjective}",
    "even {person}, who seldom comments on such things, noticed how {adjective} {aspect} {was}",
    "to my mind {aspect} {was} {manner} {made} {detail}",
    "I {liked} how {manner} {aspect} had been {made}",
    "{person} came home {feeling}, and I was just as {feeling}",
    "{aspect} left me {feeling} {detail}",
)

CONTRASTS = (
    "although {aspect} {was} {other_adjective}, {aspect} {was} {adjective} enough to settle the matter",
    "{aspect} {was} {other_adjective}, but {aspect} {moved} me {detail}",
    "for all that was {other_adjective} about {aspect}, {aspect} {was} {adverb} {adjective}",
    "{aspect} may have been {other_adjective}, yet {aspect} {was} {adjective} {detail}",
    "while {aspect} {other_moved} {person}, I found {aspect} {adjective}",
    "people had called {aspect} {other_adjective}; what I remember is how {adjective} {aspect} {was}",
    "despite {aspect}, which {was} {other_adjective}, the whole left me {feeling}",
    "{person} {other_liked} {aspect}, but in the end {aspect} {was} {manner} {made}",
    "{aspect} {was} {other_manner} {made}, and still I {liked} {aspect} {detail}",
    "{detail}, {aspect} felt {other_adjective}, though {aspect} {was} {adverb} {adjective}",
)

REMARKS = (
    "{aspect} {was} {plain}",
    "{aspect} {was} {plain}, and the same goes for {aspect}",
    "{detail}, {aspect} {was} {plain}",
    "I took a few notes about {aspect} {detail}",
    "{person} asked about {aspect}, and I said it was hard to tell",
    "I spent some time on {aspect} before I turned to {aspect}",
    "there is little to add about {aspect}",
    "{aspect} {was} {plain}, at least {detail}",
    "about {aspect} I have nothing to report",
    "{person} and I disagreed about {aspect} {detail}",
    "it was my third {noun} this year, and {aspect} {was} {plain}",
    "I would have to {do} it again to say more about {aspect}",
    "how {aspect} will hold up over the years remains to be seen",
    "as for {aspect}, opinions in our group differed",
)
