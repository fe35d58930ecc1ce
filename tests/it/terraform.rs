//! The Terraform module: it grants what the code calls, names what the AWS provider has, and prints what
//! `tramline --config` reads.
//!
//! Its expressions are evaluated here, so that this holds where there is no Terraform. With it, `.ci/run` does
//! what else can be done.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    sync::LazyLock,
};

use hcl::{
    Block, Body, Expression, Value,
    eval::{Context, Evaluate as _, FuncArgs, FuncDef, ParamType},
    expr::FuncCall,
};
use serde_json::json;
use tramline::{
    lease::dynamodb::LeaseTable,
    permissions::{self, Command, Permission, Resource, When},
};

use crate::support::{Servers, run};

const STREAM: &str = "arn:aws:kinesis:us-east-1:1:stream/ocs";
const LETTERS: &str = "arn:aws:kinesis:us-east-1:1:stream/ocs-dead-letters";
const BUCKET: &str = "arn:aws:s3:::tramline-1-us-east-1";
const KEY: &str = "arn:aws:kms:us-east-1:000000000001:key/k";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("terraform")
}

/// The `.tf` files of a folder, by name.
fn files(folder: &Path) -> BTreeMap<PathBuf, Body> {
    let entries =
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let files = entries.filter(|path| path.extension().is_some_and(|ending| ending == "tf"));
    let parsed = files.map(|path| {
        let text = fs::read_to_string(&path).expect("a file");
        let body = hcl::parse(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        (path, body)
    });
    parsed.collect()
}

/// The module's blocks of a kind, such as `variable`, in the files with these names.
fn blocks_in(kind: &str, names: &[&str]) -> impl Iterator<Item = &'static Block> {
    static ALL: LazyLock<BTreeMap<PathBuf, Body>> = LazyLock::new(|| files(&folder()));
    let chosen = ALL.iter().filter(|(path, _)| names.iter().any(|name| path.ends_with(name)));
    chosen.flat_map(|(_, body)| body.blocks()).filter(move |block| block.identifier() == kind)
}

fn label(block: &Block) -> &str {
    block.labels()[0].as_str()
}

fn attribute<'a>(block: &'a Block, name: &str) -> Option<&'a Expression> {
    let mut attributes = block.body().attributes();
    attributes.find(|attribute| attribute.key() == name).map(|attribute| attribute.expr())
}

// What Terraform knows of functions, as far as the module's policies and outputs need it.

fn array(value: &Value) -> Result<&Vec<Value>, String> {
    value.as_array().ok_or_else(|| format!("{value} is no list"))
}

fn object(value: &Value) -> Result<&hcl::value::Map<String, Value>, String> {
    value.as_object().ok_or_else(|| format!("{value} is no map"))
}

fn concat(args: FuncArgs) -> Result<Value, String> {
    let lists = args.iter().map(array).collect::<Result<Vec<_>, _>>()?;
    Ok(lists.into_iter().flatten().cloned().collect::<Vec<_>>().into())
}

fn distinct(args: FuncArgs) -> Result<Value, String> {
    let mut seen: Vec<Value> = Vec::new();
    for value in array(&args[0])? {
        if !seen.contains(value) {
            seen.push(value.clone());
        }
    }
    Ok(seen.into())
}

fn contains(args: FuncArgs) -> Result<Value, String> {
    Ok(array(&args[0])?.contains(&args[1]).into())
}

fn anytrue(args: FuncArgs) -> Result<Value, String> {
    Ok(array(&args[0])?.contains(&true.into()).into())
}

fn coalesce(args: FuncArgs) -> Result<Value, String> {
    let given = args.iter().find(|value| **value != Value::Null && value.as_str() != Some(""));
    given.cloned().ok_or_else(|| "nothing is given".to_owned())
}

fn values(args: FuncArgs) -> Result<Value, String> {
    Ok(object(&args[0])?.values().cloned().collect::<Vec<_>>().into())
}

fn length(args: FuncArgs) -> Result<Value, String> {
    Ok(args[0]
        .as_array()
        .map(Vec::len)
        .map_or_else(|| object(&args[0]).map(|map| map.len()), Ok)?
        .into())
}

fn lookup(args: FuncArgs) -> Result<Value, String> {
    let key = args[1].as_str().ok_or("a key is a text")?;
    Ok(object(&args[0])?.get(key).unwrap_or(&args[2]).clone())
}

fn merge(args: FuncArgs) -> Result<Value, String> {
    let maps = args.iter().map(object).collect::<Result<Vec<_>, _>>()?;
    Ok(Value::Object(maps.into_iter().flatten().map(|(k, v)| (k.clone(), v.clone())).collect()))
}

fn join(args: FuncArgs) -> Result<Value, String> {
    let texts = array(&args[1])?.iter().map(|text| text.as_str().ok_or("joins texts"));
    let texts = texts.collect::<Result<Vec<_>, _>>()?;
    Ok(texts.join(args[0].as_str().ok_or("joins by a text")?).into())
}

fn jsonencode(args: FuncArgs) -> Result<Value, String> {
    serde_json::to_string(&args[0]).map(Value::from).map_err(|error| error.to_string())
}

type Function = fn(FuncArgs) -> Result<Value, String>;

const FUNCTIONS: [(&str, Function); 11] = [
    ("anytrue", anytrue),
    ("coalesce", coalesce),
    ("concat", concat),
    ("contains", contains),
    ("distinct", distinct),
    ("join", join),
    ("jsonencode", jsonencode),
    ("length", length),
    ("lookup", lookup),
    ("merge", merge),
    ("values", values),
];

/// What Terraform knows of an argument of a type: `given`, with the defaults of what is optional.
fn with_defaults(kind: &Expression, given: serde_json::Value) -> serde_json::Value {
    let Expression::FuncCall(call) = kind else { return given };
    match (call.name.name.as_str(), given) {
        ("object", serde_json::Value::Object(mut given)) => {
            for (name, kind, default) in attributes(call) {
                let value = given.remove(&name).unwrap_or(default);
                given.insert(name, with_defaults(&kind, value));
            }
            given.into()
        }
        ("map", serde_json::Value::Object(given)) => {
            let entries =
                given.into_iter().map(|(key, value)| (key, with_defaults(&call.args[0], value)));
            serde_json::Value::Object(entries.collect())
        }
        (_, given) => given,
    }
}

/// The attributes of `object({…})`: name, type and default.
fn attributes(object: &FuncCall) -> Vec<(String, Expression, serde_json::Value)> {
    let Expression::Object(attributes) = &object.args[0] else { panic!("{object:?}") };
    let attributes = attributes.iter().map(|(name, kind)| {
        let (kind, default) = match kind {
            Expression::FuncCall(call) if call.name.name.as_str() == "optional" => {
                let default = call.args.get(1).map_or(json!(null), constant);
                (call.args[0].clone(), default)
            }
            kind => (kind.clone(), json!(null)),
        };
        (name.to_string(), kind, default)
    });
    attributes.collect()
}

/// An expression that depends on nothing.
fn constant(expression: &Expression) -> serde_json::Value {
    let value = expression.evaluate(&Context::new()).expect("a constant");
    serde_json::to_value(value).expect("JSON")
}

/// The locals of the module, for its arguments.
struct Module(BTreeMap<String, serde_json::Value>);

impl Module {
    fn with(arguments: serde_json::Value) -> Self {
        let mut variables = serde_json::Map::new();
        for block in blocks_in("variable", &["variables.tf"]) {
            let name = label(block);
            let given = arguments.get(name).cloned();
            let given = given.or_else(|| attribute(block, "default").map(constant));
            let given = given.unwrap_or_else(|| panic!("{name} is required"));
            let kind = attribute(block, "type").expect("a type");
            variables.insert(name.to_owned(), with_defaults(kind, given));
        }
        let applications = variables["applications"].as_object().expect("a map").iter();
        let leased = applications
            .filter(|(_, settings)| settings["checkpoint"].as_str().is_some_and(is_leased));
        let tables = leased.map(|(name, _)| (name.clone(), json!({"arn": table(name)})));
        let tables: serde_json::Map<_, _> = tables.collect();

        // What AWS would answer.
        let mut context = Context::new();
        for (name, value) in [
            ("var", serde_json::Value::Object(variables)),
            (
                "data",
                json!({
                    "aws_region": {"current": {"region": "us-east-1"}},
                    "aws_caller_identity": {"current": {"account_id": "1"}},
                }),
            ),
            (
                "aws_kinesis_stream",
                json!({
                    "this": {"arn": STREAM, "name": "ocs"},
                    "dead_letters": [{"arn": LETTERS, "name": "ocs-dead-letters"}],
                }),
            ),
            ("aws_s3_bucket", json!({"this": [{"arn": BUCKET}]})),
            ("aws_dynamodb_table", json!({"leases": tables})),
        ] {
            context.declare_var(name, hcl::value::to_value(value).expect("a value"));
        }
        for (name, function) in FUNCTIONS {
            let definition = FuncDef::builder().variadic_param(ParamType::Any).build(function);
            context.declare_func(name, definition);
        }

        let mut open: Vec<(String, Expression)> = Vec::new();
        for block in blocks_in("locals", &["main.tf", "bucket.tf", "iam.tf", "outputs.tf"]) {
            let attributes = block.body().attributes();
            open.extend(attributes.map(|local| (local.key().to_owned(), local.expr().clone())));
        }
        // One refers to another: those that can be known, until none is left of what is asked for.
        let mut known = hcl::value::Map::new();
        loop {
            let before = open.len();
            context.declare_var("local", Value::Object(known.clone()));
            open.retain(|(name, expression)| match expression.evaluate(&context) {
                Ok(value) => known.insert(name.clone(), value).is_some(),
                Err(_) => true,
            });
            if open.len() == before {
                break;
            }
        }
        for wanted in ["policies", "configuration", "producer_configuration"] {
            if let Some((_, expression)) = open.iter().find(|(name, _)| name == wanted) {
                panic!("local.{wanted}: {}", expression.evaluate(&context).expect_err("open"));
            }
        }
        let known = known.into_iter();
        Self(
            known.map(|(name, value)| (name, serde_json::to_value(value).expect("JSON"))).collect(),
        )
    }

    /// The statements of a policy, by `Sid`: actions and resources.
    fn policy(&self, role: &str) -> BTreeMap<String, (BTreeSet<String>, Vec<String>)> {
        let text =
            self.0["policies"][role].as_str().unwrap_or_else(|| panic!("no policy for {role}"));
        let policy: serde_json::Value = serde_json::from_str(text).expect("JSON");
        assert_eq!(policy["Version"], "2012-10-17");
        let mut found = BTreeMap::new();
        for statement in policy["Statement"].as_array().expect("a list") {
            let texts = |name: &str| -> Vec<String> {
                let list = statement[name].as_array().expect("a list").iter();
                list.map(|text| text.as_str().expect("a text").to_owned()).collect()
            };
            assert_eq!(statement["Effect"], "Allow");
            let actions = texts("Action");
            let count = actions.len();
            let sid = statement["Sid"].as_str().expect("a text").to_owned();
            let services = statement["Condition"]["StringEquals"]["kms:ViaService"].clone();
            let of_key = json!(["kinesis.us-east-1.amazonaws.com", "s3.us-east-1.amazonaws.com"]);
            assert_eq!(services, if sid == "Key" { of_key } else { json!(null) }, "{role} {sid}");
            let actions: BTreeSet<String> = actions.into_iter().collect();
            assert_eq!(actions.len(), count, "{role} has an action twice on {sid}");
            let earlier = found.insert(sid.clone(), (actions, texts("Resource")));
            assert_eq!(earlier, None, "{role} has {sid} twice");
        }
        found
    }
}

fn is_leased(checkpoint: &str) -> bool {
    matches!(checkpoint, "dynamodb" | "s3-by-shard")
}

fn table(application: &str) -> String {
    format!("arn:aws:dynamodb:us-east-1:1:table/{application}")
}

/// One application's settings, as the module takes them.
#[derive(Debug, Clone, Copy)]
struct Application {
    retrieval: &'static str,
    checkpoint: &'static str,
    dead_letters: &'static str,
    archive: bool,
    create_missing: bool,
}

impl Application {
    fn every() -> Vec<Self> {
        let mut every = Vec::new();
        for retrieval in ["fan-out", "polling"] {
            for checkpoint in ["dynamodb", "s3", "s3-by-shard", "none"] {
                for dead_letters in ["none", "kinesis", "s3"] {
                    for (archive, create_missing) in [(false, false), (false, true), (true, false)]
                    {
                        every.push(Self {
                            retrieval,
                            checkpoint,
                            dead_letters,
                            archive,
                            create_missing,
                        });
                    }
                }
            }
        }
        every
    }

    fn argument(self) -> serde_json::Value {
        json!({
            "retrieval": self.retrieval, "checkpoint": self.checkpoint, "dead_letters": self.dead_letters,
            "archive": self.archive, "create_missing": self.create_missing,
        })
    }

    fn uses(self, resource: Resource) -> bool {
        match resource {
            Resource::Stream => true,
            Resource::Consumer => self.retrieval == "fan-out",
            Resource::LeaseTable => is_leased(self.checkpoint),
            Resource::StateBucket | Resource::StateObjects => self.checkpoint.starts_with("s3"),
            Resource::ArchiveBucket | Resource::ArchiveObjects => self.archive,
            Resource::DeadLetterStream => self.dead_letters == "kinesis",
            Resource::DeadLetterBucket | Resource::DeadLetterObjects => self.dead_letters == "s3",
            other => panic!("a new resource {other:?}: which applications use it?"),
        }
    }

    fn wants(self, row: &Permission) -> bool {
        self.uses(row.on)
            && match row.when {
                When::Always | When::Granted => true,
                When::FanOut => self.retrieval == "fan-out",
                When::Polling => self.retrieval == "polling",
                // The module makes them, and so it need not be granted. A consumer is for fan-out.
                When::Missing => {
                    self.create_missing
                        && (row.on != Resource::Stream || self.retrieval == "fan-out")
                }
                // The module has one stream.
                When::Several => false,
                other => panic!("consume has no row {other:?}"),
            }
    }

    fn arn(self, resource: Resource) -> String {
        match resource {
            Resource::Stream => STREAM.to_owned(),
            Resource::Consumer => format!("{STREAM}/consumer/green:*"),
            Resource::LeaseTable => table("green"),
            Resource::StateObjects if self.checkpoint == "s3" => {
                format!("{BUCKET}/state/green.state")
            }
            Resource::StateObjects => format!("{BUCKET}/state/green/*.state"),
            Resource::ArchiveObjects => format!("{BUCKET}/archive/green/*"),
            Resource::DeadLetterStream => LETTERS.to_owned(),
            Resource::DeadLetterObjects => format!("{BUCKET}/dead-letters/green/*"),
            _ => BUCKET.to_owned(),
        }
    }
}

/// The rows as a policy, and what they need of a key of one's own.
fn policy<'a>(
    rows: impl Iterator<Item = &'a Permission>,
    arns: impl Fn(Resource) -> Vec<String>,
    has_key: bool,
) -> BTreeMap<String, (BTreeSet<String>, Vec<String>)> {
    let mut expected = BTreeMap::new();
    let mut of_key = BTreeSet::new();
    for row in rows {
        let statement = expected.entry(format!("{:?}", row.on));
        let (actions, _) = statement.or_insert_with(|| (BTreeSet::new(), arns(row.on)));
        actions.insert(row.action.to_owned());
        match row.action {
            "kinesis:GetRecords" | "kinesis:SubscribeToShard" | "s3:GetObject" => {
                of_key.insert("kms:Decrypt")
            }
            "kinesis:PutRecords" | "s3:PutObject" => of_key.insert("kms:GenerateDataKey"),
            _ => false,
        };
    }
    if has_key && !of_key.is_empty() {
        let of_key = of_key.into_iter().map(str::to_owned).collect();
        expected.insert("Key".to_owned(), (of_key, vec![KEY.to_owned()]));
    }
    expected
}

fn arguments(
    has_key: bool,
    applications: serde_json::Value,
    operator: serde_json::Value,
) -> serde_json::Value {
    json!({
        "stream_name": "ocs", "kms_key_arn": has_key.then_some(KEY), "applications": applications,
        "operator": operator,
    })
}

#[test]
fn no_other_policy_is_made_than_those_and_that_of_firehose() {
    let mut made = BTreeSet::new();
    for block in files(&folder()).into_values().flat_map(Body::into_blocks) {
        if block.identifier() == "resource" && label(&block).starts_with("aws_iam") {
            let text = |name| attribute(&block, name).map(ToString::to_string).unwrap_or_default();
            let (name, policy) = (block.labels()[1].as_str(), text("policy"));
            let from = if name == "firehose" {
                String::new()
            } else {
                policy + " in " + &text("for_each")
            };
            made.insert((label(&block).to_owned(), name.to_owned(), from));
        }
    }
    let expected = [
        ("aws_iam_policy", "this", "each.value in local.policies"),
        ("aws_iam_role", "firehose", ""),
        ("aws_iam_role_policy", "firehose", ""),
    ];
    let expected =
        expected.map(|(kind, name, from)| (kind.to_owned(), name.to_owned(), from.to_owned()));
    assert_eq!(made, BTreeSet::from(expected));
}

#[test]
fn the_producers_policy_is_what_the_code_calls() {
    for has_key in [false, true] {
        let module = Module::with(arguments(has_key, json!({}), json!({})));
        let rows = permissions::of(Command::Produce);
        assert_eq!(module.policy("producer"), policy(rows, |_| vec![STREAM.to_owned()], has_key));
    }
}

#[test]
fn each_consumers_policy_is_what_the_code_calls_with_its_settings_on_its_own_resources() {
    for application in Application::every() {
        for has_key in [false, true] {
            // The other one is there so that its resources could be granted by mistake.
            let others = json!({"green": application.argument(), "other": {}});
            let module = Module::with(arguments(has_key, others, json!({})));
            let rows = permissions::of(Command::Consume).filter(|row| application.wants(row));
            let expected = policy(rows, |on| vec![application.arn(on)], has_key);
            assert_eq!(module.policy("consumer-green"), expected, "{application:?}");
        }
    }
}

#[test]
fn the_operators_policy_is_what_status_lease_and_redrive_call() {
    // How an application reads is nothing to the operator.
    let is_plain = |application: &Application| {
        application.retrieval == "polling" && !application.archive && !application.create_missing
    };
    for application in Application::every().into_iter().filter(is_plain) {
        for flags in 0..16 {
            let [see_lag, move_checkpoints, redrive, has_key] =
                [1, 2, 4, 8].map(|bit| flags & bit != 0);
            let operator = json!({"see_lag": see_lag, "move_checkpoints": move_checkpoints, "redrive": redrive});
            let green = json!({"green": application.argument()});
            let module = Module::with(arguments(has_key, green, operator));

            let commands = [Command::Status, Command::Lease].into_iter();
            let rows =
                commands.chain(redrive.then_some(Command::Redrive)).flat_map(permissions::of);
            let wanted = rows.filter(|row| {
                application.uses(row.on)
                    && match row.when {
                        When::Always | When::Granted => true,
                        When::Asked => see_lag,
                        When::Write => move_checkpoints,
                        When::Several => false,
                        other => panic!("a row of an operator's command is {other:?}"),
                    }
            });
            let arns = |on| match on {
                Resource::StateObjects => vec![format!("{BUCKET}/state/*")],
                Resource::DeadLetterObjects => vec![format!("{BUCKET}/dead-letters/*")],
                on => vec![application.arn(on)],
            };
            let expected = policy(wanted, arns, has_key);
            assert_eq!(module.policy("operator"), expected, "{application:?}, {flags:04b}");
        }
    }
}

#[test]
fn each_config_file_leads_only_to_what_the_policy_grants() {
    for application in Application::every() {
        let module =
            Module::with(arguments(false, json!({"green": application.argument()}), json!({})));
        let config: toml::Table =
            module.0["configuration"]["green"].as_str().expect("a text").parse().expect("TOML");
        let granted = |sid: &str| module.policy("consumer-green").remove(sid).map(|(_, arns)| arns);
        let object = |url: &str, below: &str| {
            let path = url
                .strip_prefix("s3://")
                .or_else(|| url.strip_prefix("s3-archive://"))
                .expect("a URL");
            vec![format!("arn:aws:s3:::{path}{below}").replace("{shard}", "*")]
        };
        let text =
            |value: Option<&toml::Value>| value.and_then(|value| value.as_str()).map(str::to_owned);
        let consume = config["consume"].as_table().expect("a table");

        let state = text(config.get("checkpoint")).map(|url| object(&url, ""));
        assert_eq!(state, granted("StateObjects"), "{application:?}");
        let archive = text(consume.get("output")).map(|url| object(&url, "/*"));
        assert_eq!(archive, granted("ArchiveObjects"), "{application:?}");
        let letters = text(consume.get("dead-letters"));
        let in_bucket = letters.as_ref().filter(|place| place.starts_with("s3:"));
        // Below the prefix, letters are by application.
        let in_bucket = in_bucket.map(|url| object(url, "/green/*"));
        assert_eq!(in_bucket, granted("DeadLetterObjects"), "{application:?}");
        let in_stream = letters.filter(|place| place.starts_with("kinesis:"));
        let in_stream = in_stream
            .map(|place| vec![place.replace("kinesis://", "arn:aws:kinesis:us-east-1:1:stream/")]);
        assert_eq!(in_stream, granted("DeadLetterStream"), "{application:?}");
        assert_eq!(text(consume.get("retrieval")).as_deref(), Some(application.retrieval));
    }
}

/// What a block of a resource may hold, and what it must.
fn check_names(
    file: &str,
    what: &str,
    body: &Body,
    schema: &serde_json::Value,
    wrong: &mut Vec<String>,
) {
    let has = |list: &str, name: &str| {
        schema[list].as_array().is_some_and(|names| names.iter().any(|known| known == name))
    };
    let mut given = BTreeSet::new();
    for argument in body.attributes() {
        given.insert(argument.key().to_owned());
        if !has("required", argument.key()) && !has("optional", argument.key()) {
            wrong.push(format!("{file}: {what} has no argument {}", argument.key()));
        }
    }
    for block in body.blocks() {
        // The block that a dynamic one makes is in its `content`.
        let (name, body) = match block.identifier() {
            "dynamic" => {
                (label(block), block.body().blocks().find(|b| b.identifier() == "content"))
            }
            name => (name, Some(block)),
        };
        given.insert(name.to_owned());
        let inside = format!("{what}.{name}");
        match (schema["blocks"].get(name), body) {
            (Some(schema), Some(block)) => check_names(file, &inside, block.body(), schema, wrong),
            _ => wrong.push(format!("{file}: there is no block {inside}, or no content in it")),
        }
    }
    for list in ["required", "needed_blocks"] {
        for needed in schema[list].as_array().into_iter().flatten().filter_map(|name| name.as_str())
        {
            if !given.contains(needed) {
                wrong.push(format!("{file}: {what} needs {needed}"));
            }
        }
    }
}

#[test]
fn every_resource_argument_and_block_is_in_the_schema_of_the_aws_provider() {
    let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/terraform/schema.json");
    let schema = fs::read_to_string(schema).expect("the schema, made by tests/terraform/extract");
    let schema: serde_json::Value = serde_json::from_str(&schema).expect("JSON");
    let (mut wrong, mut seen, mut resources) = (Vec::new(), BTreeSet::new(), 0);
    for place in ["", "examples/minimal", "examples/complete"] {
        for (file, body) in files(&folder().join(place)) {
            for block in
                body.blocks().filter(|block| matches!(block.identifier(), "resource" | "data"))
            {
                // What is Terraform's own is in every resource.
                let body = block.body().iter().filter(|structure| {
                    let argument = structure.as_attribute().map(|argument| argument.key());
                    let block = structure.as_block().map(Block::identifier);
                    !matches!(argument, Some("count" | "for_each" | "depends_on" | "provider"))
                        && block != Some("lifecycle")
                });
                let what = format!("{} {}", block.identifier(), label(block));
                match schema[block.identifier()].get(label(block)) {
                    Some(schema) => {
                        let body: Body = body.cloned().collect();
                        check_names(&file.display().to_string(), &what, &body, schema, &mut wrong);
                    }
                    None => wrong.push(format!("{}: the schema has no {what}", file.display())),
                }
                seen.insert(what);
                resources += 1;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(resources > 25, "{resources} resources");
    let kinds = ["resource", "data"].iter();
    let known = kinds.flat_map(|kind| {
        schema[kind].as_object().expect("a map").keys().map(move |name| format!("{kind} {name}"))
    });
    assert_eq!(seen, known.collect(), "run tests/terraform/extract again: it has what is not used");
}

#[test]
fn the_readme_has_every_variable_and_output() {
    let text = |block: &Block, name: &str| {
        let value =
            constant(attribute(block, name).unwrap_or_else(|| panic!("{} {name}", label(block))));
        value.as_str().expect("a text").to_owned()
    };
    let mut tables = String::from("| variable | default | meaning |\n|---|---|---|\n");
    for block in blocks_in("variable", &["variables.tf"]) {
        let default = match attribute(block, "default") {
            None => "required".to_owned(),
            Some(default) => {
                let kind = attribute(block, "type").expect("a type");
                format!("`{}`", with_defaults(kind, constant(default)))
            }
        };
        let meaning = text(block, "description");
        writeln!(tables, "| `{}` | {default} | {meaning} |", label(block)).expect("a string");
    }
    tables.push_str("\n| output | meaning |\n|---|---|\n");
    for block in blocks_in("output", &["outputs.tf"]) {
        writeln!(tables, "| `{}` | {} |", label(block), text(block, "description"))
            .expect("a string");
    }
    let readme = fs::read_to_string(folder().join("README.md")).expect("a README");
    assert!(readme.contains(&tables), "write these tables into terraform/README.md:\n\n{tables}");

    let alarms =
        blocks_in("locals", &["alarms.tf"]).find_map(|block| attribute(block, "stream_alarms"));
    let Some(Expression::Object(alarms)) = alarms else { panic!("{alarms:?}") };
    for name in alarms.keys() {
        assert!(
            readme.contains(&format!("`{name}`")),
            "terraform/README.md does not tell of alarm {name}"
        );
    }

    // What an application is told has a row of its own, with its default.
    let applications =
        blocks_in("variable", &["variables.tf"]).find(|block| label(block) == "applications");
    let kind = applications.and_then(|block| attribute(block, "type")).expect("a type");
    let Expression::FuncCall(map) = kind else { panic!("{kind:?}") };
    let Expression::FuncCall(object) = &map.args[0] else { panic!("{map:?}") };
    for (name, _, default) in attributes(object) {
        let row = format!("| `{name}` | `{default}` |");
        assert!(readme.contains(&row), "terraform/README.md has no row {row}");
    }
}

/// Whether a resource of a policy, with `*` at most once, stands for this one.
fn covers(pattern: &str, arn: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == arn,
        Some((start, end)) => {
            arn.strip_prefix(start).is_some_and(|rest| rest.strip_suffix(end).is_some())
        }
    }
}

#[test]
fn tramline_takes_the_config_files_that_the_module_prints() {
    let applications = json!({
        "fleet": {"lease_table": "leases", "dead_letters": "kinesis", "start": "service-day"},
        "one-object": {"checkpoint": "s3", "dead_letters": "s3"},
        "by-shard": {"retrieval": "fan-out", "checkpoint": "s3-by-shard", "archive": true},
        "display": {"checkpoint": "none", "start": "latest"},
    });
    let module = Module::with(arguments(false, applications, json!({})));
    let servers = Servers::with_stream("ocs", 1);
    servers.create_stream("ocs-dead-letters", 1);
    let config = servers.local.sdk_config();
    let s3 = aws_sdk_s3::config::Builder::from(&config).force_path_style(true).build();
    let bucket = aws_sdk_s3::Client::from_conf(s3).create_bucket().bucket("tramline-1-us-east-1");
    servers.wait(bucket.send()).expect("a bucket");
    for table in ["leases", "by-shard"] {
        servers.wait(LeaseTable::new(&config, table).ensure()).expect("a table");
    }

    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tramline.toml");
    let file_name = file.to_str().expect("a path");
    let files = module.0["configuration"].as_object().expect("a map");
    assert_eq!(files.len(), 4);
    for (name, content) in files {
        fs::write(&file, content.as_str().expect("a text")).expect("a write");
        let checked = run(servers.tramline(&["check", "--config", file_name, "--json"]));
        let report: serde_json::Value = serde_json::from_str(&checked.stdout[0]).expect("JSON");
        assert_eq!(report["failed"], 0, "{name}: {report:#}");
        // What `check` tries is granted, so that it does not fail where the worker would not.
        let policy = module.policy(&format!("consumer-{name}"));
        for line in report["checks"].as_array().expect("a list") {
            let Some(object) =
                line["check"].as_str().and_then(|check| check.strip_prefix("object s3://"))
            else {
                continue;
            };
            let (arn, action) =
                (format!("arn:aws:s3:::{object}"), line["action"].as_str().expect("an action"));
            let is_granted = policy.values().any(|(actions, resources)| {
                actions.contains(action) && resources.iter().any(|pattern| covers(pattern, &arn))
            });
            assert!(is_granted, "{name}: {action} on {arn}");
        }
        let read = ["consume", "--config", file_name, "--exit-when-idle", "100ms"];
        run(servers.tramline(&read)).succeeded();
        // Nothing is kept of `display`, so that there is no status.
        if name != "display" {
            let status =
                run(servers.tramline(&["status", "--config", file_name, "--json"])).succeeded();
            assert!(status.stdout.join("").contains("shardId-000000000000"), "{status:?}");
        }
    }

    fs::write(&file, module.0["producer_configuration"].as_str().expect("a text"))
        .expect("a write");
    let checked = run(servers.tramline(&["check", "--for", "produce", "--config", file_name]));
    checked.succeeded();
}
