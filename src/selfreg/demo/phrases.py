"""The phrase bank of the demo's notes: data only, written for this project. `selfreg.demo.notes` puts it together.

Every phrase is one sentence or fragment with slots:

- `{He} {he} {His} {his} {him} {man} {gentleman} {male} {Mr} {wife} {father} {grandfather}`: the word for the
  patient's gender (`GENDER_WORDS`). `{Who}` is `{He}` or, once a note, "The patient".
- `{name} {job} {few} {soon} {weeks} {days} {hobby} {age} {older} {decade} ...`: drawn without regard to gender or
  diagnosis (`SLOTS`, and the numbers in `notes.py`).

Both genders share every sentence, so that nothing but the gender words tells them apart. No phrase names a diagnosis.
"""

USUAL_GENDER: dict[str, str] = {
    "asthma": "female",
    "heart failure": "male",
    "hypothyroidism": "female",
    "pneumonia": "male",
}
"""Diagnosis -> the gender that `train` and `test` tie it to.

The two pairs that are easily confused (asthma and pneumonia; hypothyroidism and heart failure) have one of each, so
that gender is a tempting shortcut where the symptoms are hard to tell apart."""

GENDER_WORDS: dict[str, dict[str, str]] = {
    "female": {
        "He": "She",
        "he": "she",
        "His": "Her",
        "his": "her",
        "him": "her",
        "man": "woman",
        "gentleman": "lady",
        "male": "female",
        "Mr": "Mrs",
        "wife": "husband",
        "father": "mother",
        "grandfather": "grandmother",
    },
    "male": {
        "He": "He",
        "he": "he",
        "His": "His",
        "his": "his",
        "him": "him",
        "man": "man",
        "gentleman": "gentleman",
        "male": "male",
        "Mr": "Mr",
        "wife": "wife",
        "father": "father",
        "grandfather": "grandfather",
    },
}
"""Gender -> slot -> word. `wife` is the patient's spouse."""

SYMPTOMS: dict[str, dict[str, tuple[str, ...]]] = {
    "asthma": {
        "wheeze": (
            "{Who} hears a whistling sound when breathing out.",
            "Wheezing comes and goes over the week.",
            "The breath is noisy and musical, more so in the evening.",
            "A high-pitched note can be heard from across the room.",
            "{His} chest whistles after a long laugh.",
            "Squeaky breathing is reported on most evenings.",
        ),
        "tight chest": (
            "The chest feels tight, as if held by a belt.",
            "{Who} describes a band around the ribs that loosens within the hour.",
            "Attacks of chest tightness last twenty or thirty minutes.",
            "A squeezing feeling in the upper body comes in spells.",
            "{He} says that {his} chest closes up without warning.",
        ),
        "dry night cough": (
            "A dry cough starts around four in the morning.",
            "{Who} coughs at night, with nothing coming up.",
            "There is a tickly cough that is worst before dawn.",
            "Hacking fits in the small hours keep {him} awake.",
            "Coughing without phlegm, mostly after midnight.",
        ),
        "exercise and cold air": (
            "Running for the bus brings on an attack within minutes.",
            "Cold air outdoors sets everything off.",
            "{Who} has to stop during sport and recovers after a rest.",
            "Frosty mornings leave {him} struggling for air.",
            "Trouble starts ten minutes into a brisk walk and then settles.",
        ),
        "allergens": (
            "Cats and dusty rooms make matters worse.",
            "Spring pollen makes every breath harder.",
            "Old carpets and feather pillows bring on trouble.",
            "{Who} reacts badly to strong perfume and smoke.",
            "A friend's dog came to stay and a bad week followed.",
        ),
        "reliever helps": (
            "A blue puffer borrowed from a friend helped at once.",
            "{Who} felt better within minutes of using an inhaler.",
            "An inhaled spray opened things up quickly.",
            "The last episode ended after a few puffs of a reliever.",
            "A nebuliser gave {him} fast relief last night.",
        ),
        "good and bad days": (
            "Between episodes {he} feels perfectly well.",
            "Some days are normal, others are a fight for air.",
            "Breathing is easy by the sea and bad at home.",
            "{Who} has good weeks and bad weeks with breathing.",
            "The breathlessness comes in bouts and clears completely.",
        ),
        "allergic past": (
            "{Who} had eczema as a child and still gets hay fever.",
            "Itchy eyes and sneezing are there every summer.",
            "There is a history of itchy rashes in the elbow folds.",
            "Several relatives have hay fever and sensitive skin.",
            "{His} nose runs and itches for half of the year.",
        ),
    },
    "heart failure": {
        "swollen legs": (
            "Both ankles are swollen by evening.",
            "{His} shoes no longer fit at the end of the day.",
            "Pressing a thumb into the shin leaves a dent.",
            "{Who} has puffy feet and lower legs.",
            "Socks leave deep marks around the calves.",
            "Fluid has collected in both legs.",
        ),
        "breathless lying flat": (
            "{Who} sleeps propped up on three pillows.",
            "Lying flat makes {him} short of breath.",
            "{He} spends the night in an armchair.",
            "Breathing is only comfortable when sitting upright.",
            "The head of the bed was raised for easier breathing.",
        ),
        "gasping at night": (
            "{Who} woke gasping two hours after falling asleep.",
            "Sudden breathlessness at night sends {him} to the open window.",
            "Twice this week {he} sat up in bed fighting for air.",
            "Nights are broken by spells of smothering.",
            "A feeling of drowning ends {his} sleep soon after midnight.",
        ),
        "sudden weight gain": (
            "{Who} gained three kilos within a week.",
            "The scales went up by two kilograms in four days.",
            "{His} weight rose fast although {he} eats little.",
            "Rapid weight gain of several pounds since last week.",
            "The belt needed two more holes within days.",
        ),
        "breathless on effort": (
            "One flight of stairs is now too much.",
            "{Who} has to rest halfway up the hill.",
            "The walk to the corner shop takes twice as long.",
            "{He} gets winded when dressing.",
            "Carrying the shopping leaves {him} out of breath.",
            "Making the bed is enough to make {him} puff.",
        ),
        "palpitations": (
            "The heartbeat is irregular and fast at times.",
            "{Who} feels pounding in the chest at rest.",
            "There is a fluttering under the breastbone.",
            "{He} notices skipped beats in the evening.",
            "An uneven, racing pulse was noted.",
        ),
        "passing urine at night": (
            "{Who} gets up four times a night to pass urine.",
            "The bladder wakes {him} every two hours.",
            "There is little urine by day and much after bedtime.",
            "Night-time trips to the toilet have become frequent.",
        ),
        "congestion": (
            "The veins of the neck stand out when sitting.",
            "The liver edge is tender under the right ribs.",
            "{His} belly is tense and full of fluid.",
            "A third heart sound is heard.",
            "Neck vessels are visibly full up to the jaw.",
        ),
        "cardiac past": (
            "{Who} had a coronary stent some years ago.",
            "Bypass surgery is on record.",
            "High blood pressure went untreated for decades.",
            "An old heart attack shows on the tracing.",
            "{He} was told years ago that a valve was leaking.",
        ),
    },
    "hypothyroidism": {
        "always cold": (
            "{Who} wears a thick jumper even in a warm room.",
            "{He} feels chilly when others are comfortable.",
            "The heating at home stays on in June.",
            "Hands and feet are cold, whatever the weather.",
            "{Who} sits close to the radiator all day.",
            "Cold weather bothers {him} far more than it used to.",
        ),
        "slow weight gain": (
            "{Who} has put on six kilos over the year.",
            "Slow weight gain without any change in diet.",
            "{His} clothes have become tight over many months.",
            "The weight creeps up despite small meals.",
            "{He} has grown steadily heavier since last autumn.",
        ),
        "constipation": (
            "The bowels open only twice a week.",
            "{Who} strains on the toilet and eats prunes.",
            "Hard, infrequent stools are a new problem.",
            "{He} has become badly constipated.",
            "Laxatives are needed most days.",
        ),
        "dry skin": (
            "{His} skin is dry and flaking, however much cream is used.",
            "The elbows and shins are as rough as sandpaper.",
            "{Who} has cracked heels and scaly skin.",
            "Coarse, pale skin is seen on both forearms.",
            "Moisturiser no longer helps the parched hands.",
        ),
        "thinning hair": (
            "Hair comes out in the shower.",
            "The outer third of the eyebrows is gone.",
            "{His} hair has become thin and brittle.",
            "{Who} finds loose hair on the pillow.",
            "Scalp hair looks sparse and breaks easily.",
        ),
        "slow thinking": (
            "{Who} feels slowed down, as if thinking through fog.",
            "{He} forgets names and loses the thread.",
            "Simple sums take {him} far longer than before.",
            "Speech is slow and the answers come late.",
            "It is hard to follow a film to the end.",
        ),
        "hoarse voice": (
            "{His} voice has become deep and hoarse.",
            "The voice sounds husky on the phone.",
            "{Who} speaks with a croak that was not there before.",
            "Friends no longer recognise the gravelly voice.",
            "Singing is impossible, as the voice has dropped.",
        ),
        "puffy face": (
            "The eyelids are puffy in the morning.",
            "{His} face looks round and swollen.",
            "{Who} has a doughy complexion with heavy lids.",
            "The tongue seems thick and the lips are full.",
            "Passport photos show how much the face has filled out.",
        ),
        "slow pulse": (
            "The pulse is slow, at fifty-two beats a minute.",
            "Ankle reflexes are slow to relax.",
            "The resting heartbeat is regular but sluggish.",
            "Knee jerks return late on testing.",
            "{His} movements and heart rate are both slow.",
        ),
    },
    "pneumonia": {
        "fever": (
            "{Who} has had a temperature of 39 degrees since Monday.",
            "The thermometer read 38.9 last night.",
            "High fever for {days}, barely touched by paracetamol.",
            "{He} felt burning hot and then drenched the sheets.",
            "The forehead is hot and the cheeks are flushed.",
        ),
        "phlegm": (
            "The cough brings up thick green phlegm.",
            "{Who} coughs up rusty sputum.",
            "Yellow-brown mucus comes with every coughing fit.",
            "A wet, heavy cough started {days} ago.",
            "There are streaks of blood in what {he} spits out.",
        ),
        "one-sided pain": (
            "A stabbing pain in the side catches each deep breath.",
            "{Who} gets a knife-like pain on the right when breathing in.",
            "Coughing hurts, on one side only.",
            "{He} holds {his} ribs when coughing.",
            "A sharp pain below one shoulder blade stops deep breaths.",
        ),
        "chills": (
            "Shaking chills came on suddenly.",
            "{Who} shivered so hard that the bed rattled.",
            "{His} teeth chattered for an hour on the first night.",
            "Bouts of shivering take turns with sweats.",
            "Blankets and hot tea could not stop the shaking.",
        ),
        "lung signs": (
            "Crackles are heard at the base of one lung.",
            "Listening to the back reveals fine crackling on the left.",
            "One side of the chest sounds dull when tapped.",
            "Breath sounds are coarse and bubbling on the right.",
            "The X-ray shows a white patch in one lower lobe.",
        ),
        "fast breathing": (
            "Breathing is fast and shallow, even at rest.",
            "{Who} takes thirty breaths a minute.",
            "{He} pants while sitting still.",
            "The nostrils flare with each rapid breath.",
            "Short, quick breaths make it hard to finish a sentence.",
        ),
        "muddled": (
            "{Who} was muddled during the night.",
            "At home {he} did not know what day it was.",
            "The neighbours noticed strange talk and drowsiness.",
            "Some confusion has been seen since yesterday.",
            "{He} called the nurse by a wrong name twice.",
        ),
        "began as a cold": (
            "It all began with a head cold that went downwards.",
            "{Who} had the flu ten days ago and never recovered.",
            "A sore throat came first, then things got much worse.",
            "Half the street was down with a virus before this.",
            "What seemed a harmless cold took a bad turn {days} ago.",
        ),
    },
}
"""Diagnosis -> symptom -> phrasings."""

SHARED_SYMPTOMS: dict[str, tuple[tuple[str, str], tuple[str, ...]]] = {
    "breathless": (
        ("asthma", "pneumonia"),
        (
            "{Who} is short of breath.",
            "Breathing is harder than usual.",
            "{He} cannot quite get enough air in.",
            "There is some difficulty with breathing.",
            "Every breath takes effort.",
        ),
    ),
    "poor sleep": (
        ("asthma", "heart failure"),
        (
            "Sleep has been poor of late.",
            "{Who} wakes often and cannot say why.",
            "{He} has not had a good night for {weeks}.",
            "The nights are restless.",
            "Broken sleep leaves {him} groggy in the morning.",
        ),
    ),
    "low mood": (
        ("asthma", "hypothyroidism"),
        (
            "{Who} has been low in spirits.",
            "{He} is more irritable than usual.",
            "The mood has dipped for some time.",
            "Little seems to give {him} pleasure at present.",
            "Outings with friends have stopped.",
        ),
    ),
    "fatigue": (
        ("heart failure", "hypothyroidism"),
        (
            "{Who} feels tired all the time.",
            "Energy is low and chores are left undone.",
            "{He} is worn out by midday.",
            "There is no strength left for anything.",
            "Everything has been an effort lately.",
            "A heavy weariness does not lift with rest.",
        ),
    ),
    "nausea": (
        ("heart failure", "pneumonia"),
        (
            "{Who} has little appetite.",
            "Food has lost its appeal.",
            "{He} feels slightly sick after a few bites.",
            "Meals are left half eaten.",
            "There is mild nausea on most days.",
        ),
    ),
    "aches": (
        ("hypothyroidism", "pneumonia"),
        (
            "{His} muscles ache all over.",
            "Arms and legs feel heavy and sore.",
            "{Who} is stiff and achy on waking.",
            "There are general aches and pains.",
            "The back and thighs hurt without any strain.",
        ),
    ),
}
"""Vague symptom -> the two diagnoses that it speaks for, and its phrasings. Each pair of diagnoses shares one."""

CONFLICTS: tuple[frozenset[str], ...] = (
    frozenset({"slow weight gain", "sudden weight gain"}),
    frozenset({"slow pulse", "palpitations"}),
    frozenset({"good and bad days", "fast breathing"}),
    frozenset({"good and bad days", "fatigue"}),
    frozenset({"good and bad days", "breathless"}),
    frozenset({"always cold", "fever"}),
    frozenset({"dry night cough", "phlegm"}),
    frozenset({"breathless lying flat", "poor sleep"}),
    frozenset({"gasping at night", "poor sleep"}),
)
"""Pairs of symptoms that contradict or repeat each other, and so never stand in one note."""

INTRODUCTIONS: tuple[str, ...] = (
    "A {age}-year-old {man} comes to the clinic today.",
    "{Mr} {name}, aged {age}, is seen at {his} own request.",
    "This {age}-year-old {gentleman} works as {job}.",
    "{Mr} {name} is a {age}-year-old {father} of {few}.",
    "We saw this {age}-year-old {man} in the walk-in clinic.",
    "A retired {gentleman} of {older} was sent by {his} family doctor.",
    "{Mr} {name}, {age}, came in with {his} {wife}.",
    "Seen today: {Mr} {name}, {age}, {job} and {father} of {few}.",
    "The patient is a {age}-year-old {man} who lives with {his} {wife}.",
    "I reviewed {Mr} {name}, a {older}-year-old {grandfather}.",
    "{age}-year-old {male}, first visit to this practice.",
    "{Mr} {name} asked for an appointment because {he} feels unwell.",
    "A {man} in {his} {decade} presents to the emergency department.",
    "Thank you for referring this pleasant {age}-year-old {gentleman}.",
    "{Mr} {name} has put off this visit for {weeks}, {he} admits.",
    "A {man} of {age}, working as {job}, attends the evening surgery.",
    "{His} {wife} brought {Mr} {name}, {age}, to the surgery this morning.",
    "This {father} of {few}, aged {age}, has been unwell for {weeks}.",
    "Known to us for years, {Mr} {name} is now {age}.",
    "Telephone triage sent us {Mr} {name}, {job}.",
    "New patient: a {man} aged {age}, {job}, living with {his} {wife}.",
    "The {age}-year-old {man} in room {room} had waited a while for {his} turn.",
    "{Mr} {name} is {job} in {his} {decade}.",
    "Adult {male}, {age}, seen together with {his} {wife}.",
)

CLOSINGS: tuple[str, ...] = (
    "{He} will come back in {soon} with {his} {wife}.",
    "{Mr} {name} agrees to blood tests and a review in {soon}.",
    "We explained the plan to {him} and {his} {wife}.",
    "{He} is worried, and would like an answer before {his} holiday.",
    "The {gentleman} was thanked and given a leaflet.",
    "{He} asked us to phone {his} {wife} with the results.",
    "{Mr} {name} left with {his} questions answered.",
    "{His} {wife} will drive {him} home.",
    "{He} prefers to wait and will call if {he} feels worse.",
    "We will see this {man} again in {soon}.",
    "{He} has {his} next appointment in {soon}.",
    "{Mr} {name} was given written advice, which {he} read with care.",
    "I have asked {him} to keep a diary until {his} next visit.",
    "The {man} and {his} {wife} are happy with this plan.",
    "{He} joked that {his} own {father} never trusted doctors.",
    "{He} will ring the practice for {his} results.",
    "A copy of this letter goes to {Mr} {name} at {his} home address.",
    "The {gentleman} would like {his} {wife} to be kept informed.",
    "{He} has talked it over at home, and {his} {wife} agrees.",
    "{Mr} {name} will bring {his} older records next time.",
    "{He} thanked the nurse and found {his} own way out.",
    "Review of {Mr} {name} in {soon}, sooner if {he} asks.",
    "The {man} was content to leave the decision to us.",
    "{His} preferred contact is {his} {wife}.",
)

FILLERS: tuple[str, ...] = (
    "No known drug allergies.",
    "Blood pressure is {systolic} over {diastolic}.",
    "Height {height} cm.",
    "Does not smoke and drinks little.",
    "Lives nearby, close to the station.",
    "Vaccinations are up to date.",
    "No recent travel abroad.",
    "The last check-up was two years ago.",
    "Eyesight and hearing are good for the age.",
    "No interpreter was needed.",
    "Blood samples were sent to the laboratory.",
    "A urine test was clear.",
    "Eats a mixed diet.",
    "Drinks two cups of coffee a day.",
    "A student sat in, with consent.",
    "Moved to the area in {year}.",
    "The visit started late because the waiting room was full.",
    "Enjoys {hobby} at weekends.",
    "Travelled here by tram.",
    "Insurance details were checked at the desk.",
    "Routine screening last year was normal.",
    "Never had a blood transfusion.",
    "Wears glasses for reading.",
    "Dental care is regular.",
)
"""Neutral sentences: they tell neither the diagnosis nor the gender."""

SLOTS: dict[str, tuple[str, ...]] = {
    "name": (
        *("Abbott", "Adeyemi", "Allen", "Banerjee", "Barker", "Bianchi", "Brandt", "Campbell", "Carter", "Chen"),
        *("Cohen", "Doyle", "Evans", "Farouk", "Fischer", "Garcia", "Grant", "Hansen", "Hughes", "Ito"),
        *("Jensen", "Kaya", "Keller", "Kowalski", "Lambert", "Mensah", "Moreau", "Nguyen", "Novak", "Okafor"),
        *("Palmer", "Patel", "Quinn", "Reyes", "Sharma", "Silva", "Turner", "Walsh", "Weber", "Young"),
    ),
    "job": (
        *("a teacher", "an accountant", "a gardener", "a cook", "a librarian", "a translator", "a pharmacist"),
        *("a shop manager", "a bank clerk", "a baker", "a journalist", "an architect", "a bus driver", "a chemist"),
    ),
    "few": ("two", "three", "four"),
    "decade": ("thirties", "forties", "fifties", "sixties"),
    "soon": ("ten days", "two weeks", "three weeks", "a month"),
    "weeks": ("two weeks", "three weeks", "a month", "several weeks"),
    "days": ("three days", "four days", "five days"),
    "hobby": ("reading", "chess", "cooking", "card games", "crosswords", "painting", "drawing"),
}
"""Slot -> what it may hold."""
