"""The canvas' vocabulary of ordinary English: filler for captions, and what an attacker searches.

Concept words (objects, styles, mascots, weather and their synonyms) are in ``world.py``; none of them stands here.
"""

from __future__ import annotations

COMMON = tuple(
    """
able about above accept across act active actor add admit adult advice affair afraid after again age agency agree ahead
aim allow almost alone along already also always amount ancient angle angry animal annual answer any anyone apart appear
apple apply area argue arm around arrive article artist ask asleep assume attack attempt attend aunt autumn avenue average
avoid awake away baby back badge bag bake balance ball banana band bank bar bare barn barrel base basic basin basket bath
battle beach beam bean bear beard beat beauty become bed beef before begin behave behind believe bell belong below belt
bench bend beneath berry beside best better between beyond bicycle big bill bird birth bite bitter blade blame blank blanket
blend bless blind block blood blow board body bold bone bonus book border born borrow boss both bother bottle bottom bowl
box boy brain branch brave bread break breath breeze brick bridge brief bring broad broken brother brown brush bucket budget
build bundle burn burst bus bush business busy butter button buy cabin cable cake call calm camel camera camp canal candle
canvas cap capital captain card care career careful carpet carrot carry cart case cash castle cat catch cattle cause cave
ceiling cell centre century cereal certain chain chair chalk chance change channel chapter charge charm chart chase cheap
check cheek cheer cheese cherry chess chest chicken chief child chin choice choose church circle citizen city civil claim
class clay clean clear clerk clever client cliff climb close cloth clothes cloud club coach coal coast coat code coffee coin
cold collar collect college colour column comb come comfort common company compare complete concert condition confirm connect
consider contain content contest continue contract control cook cool copper copy coral corn corner correct cost cotton couch
cough could council count country couple courage course court cousin cover cow crab craft cream create credit crew crop
cross crowd crown cruel cry crystal culture curious current curtain curve custom cut cycle daily damage dance danger dare
dark data date daughter dawn day dead deal dear debate debt decade decide deck deep deer defend degree delay deliver demand
dentist depend depth desert deserve design desk detail develop device dialogue diamond diary dictionary differ difficult dig
dinner direct dirt discover discuss dish distance divide doctor document dog doll dollar donkey door double doubt down dozen
draft dragon drama draw drawer dream dress drink drive drop drum dry duck dull during dust duty each eager eagle ear early
earn earth ease east easy eat echo edge edit effect effort egg eight either elbow elder elect element elephant eleven else
empire employ empty end enemy energy engine enjoy enough enter entire equal error escape even evening event ever every exact
examine example excite excuse exercise exist exit expect expensive explain extra eye fabric face fact factory fail fair faith
fall false fame family famous fan fancy far farm farmer fashion fast fat father fault favour fear feast feather feed feel
fellow fence fetch fever few field fierce fifteen fight figure file fill film final find fine finger finish fire firm first
fit five fix flag flame flat flavour flight float flock flood floor flour flow fly focus fold folk follow food foot football
force foreign forest forever forget forgive fork form formal fortune forty forward found four fox frame free freeze fresh
friend frog from front fruit fuel full fun funny fur future gain gallery game garage garden garlic gas gate gather gentle
giant gift giraffe girl give glad glass glove glue goal goat gold golf good goose govern grab grace grade grain grand grant
grape grass grateful grave gravity great green grey grid grocery ground group grow guard guess guest guide guilty guitar
habit hair half hall hammer hand handle hang happen happy harbour hard harvest hat hate have hawk head health heap hear heart
heat heavy hedge heel height help hen herb here hero hide high hill hint history hit hobby hold hole holiday holy honest
honey honour hook hope horn horse hospital host hot hotel hour hover huge human humble hundred hungry hunt hurry hurt
husband ice idea ideal image imagine impact include income increase indeed index indoor industry inform ink inner insect
inside insist instead interest into invent invite iron island item ivory jacket jam jar jazz jeans jelly jewel job join joke
journey joy judge juice jump june jungle junior just keen keep kettle key kick kid kind king kiss kitchen kite knee knife
knock knot know label labour lace ladder lady lake lamb lamp land lane language lantern large last late laugh launch laundry
law lawn lawyer layer lazy lead leaf learn least leather leave lecture left leg legal lemon lend length lens lesson letter
level library lid life lift like limit line lion lip list listen little live lizard load loan local lock log lonely long look
loose lord lose loud love lovely low loyal luck lunch machine magic mail main major make man manage many map marble march
mark market marriage mask mass master match mate matter maybe meadow meal mean measure meat medal medicine meet melody
melon member memory mend mention menu mercy merry message metal method middle might mild mile milk mill mind mine minister
mint minute mirror miss mistake mix mixture modern modest moment monday money monkey monster month mood moon moral more
morning most mother motion motor mountain mouse mouth move movie much mud muscle museum music must mystery nail name narrow
nation native nature near neat neck need needle neighbour neither nephew nerve nest net never new news next nice niece nine
noble nobody noise none noon normal north nose note nothing notice novel now number nurse nut obey object ocean october odd
off offer office officer often oil old olive once onion only open opera opinion orange orbit order ordinary organ other
otter outer outside oven over owl own owner oxygen pack page pain pair palace pale palm pan panel panic paper parade parcel
parent park parrot part partner party pass past pasta paste path patient pattern pause pay peace peach peak pear pearl
pebble pen penguin people pepper perfect perhaps period permit person phone piano pick picnic picture piece pig pigeon pile
pillow pilot pin pine pink pipe pirate pitch place plain plan plane planet plant plate play player please plenty plot plum
plus pocket poem poet police polish polite pond pony pool poor popular porch port position possible post pot potato pound
powder power practice praise pray prefer prepare present press pretty prevent price pride prince print prison private prize
problem process produce profit project promise proof proper protect proud prove public pull pulse pump punch pupil puppy pure
purple purpose purse push puzzle quality quarter queen question quick quiet quilt quite quiz quote rabbit race radio rail
rain rainbow raise ranch range rapid rare rather raw reach react read ready real reason receive recent recipe record red
reduce refuse region regret regular relax remain remember remind remove rent repair repeat reply report request rescue
respect rest result return reveal reward rhythm ribbon rice rich ride rifle right ring ripe rise risk rival river road roast
robot rock role roll roof room root rope rose rough round route row royal rubber rude rug rule ruler run rush sack sad
saddle safe sail salad salary sale salt same sample sand sandwich satin sauce save scale scarf scene school science scissors
score screen sea search season seat second secret see seed seek seem select self sell send sense september serious serve
service set settle seven several shade shadow shake shape share sharp sheep sheet shelf shell shelter shine shirt shock shoe
shop shore short should shoulder shout show shower shut shy sick side sight sign signal silence silk silver similar simple
since sing single sink sister sit six size skill skin skirt sky sleep slice slide slim slip slow small smart smell smile
smoke smooth snack snail snake snow soap soccer social sock sofa soft soil soldier solid solve some song soon sorry sort soul
sound soup sour south space spare speak special speech speed spell spend spice spider spin spirit spoon sport spot spread
spring square squirrel stable staff stage stair stamp stand start state station stay steady steal steam steel steep stem step
stick still stock stomach stone stool stop store story straight strange straw stream street strength stretch strict string
strong student study style subject success such sudden sugar suggest suit summer sun sunday supper supply support sure
surface surprise swan sweep sweet swim swing switch sword symbol system table tail tailor take tale talk tall tank tape task
taste tax teach teacher team tear tell temple ten tennis tent term test thank theatre then theory there thick thief thin
thing think third thirsty thirty thousand thread three throat throne through throw thumb ticket tidy tie tiger tight timber
time tin tiny tip tired title toast today toe together tomato tomorrow tone tongue tonight tool tooth top topic total touch
tour towards towel tower town toy trace track trade traffic trail train travel treasure treat trial triangle tribe trick trip
trouble truck true trumpet trunk trust truth try tube tuesday tune tunnel turkey turn turtle twelve twenty twice twin two
type tyre ugly uncle under uniform union unique unit until upon upper upset urban use usual valley value van vase vast
velvet verb verse very vest victory view village violin visit visitor voice volume vote voyage wage wagon waist wait wake
walk wall wallet walnut want war warm warn wash waste water wave wax way weak wealth wear wedding week weekend weigh welcome
well west wet whale wheat wheel when where which while whisper whistle white whole wide wife wild will win wind window wine
wing winner winter wire wisdom wise wish with without witness wolf woman wonder wood wool word work worker world worry worth
would wrap wreck wrist write wrong yard year yellow yes yesterday yet yoghurt young zebra zero zone
""".split()
)
