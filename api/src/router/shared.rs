// SPDX-License-Identifier: Apache-2.0

//! Moves repeated parts of the document into components. A generated client has a separate type for each part that is
//! written out in place.

use std::collections::{BTreeMap, BTreeSet};

use utoipa::openapi::{OpenApi, Ref, RefOr, Response, Schema, path::Operation, schema::ArrayItems};

/// The content type of problems.
const PROBLEM: &str = "application/problem+json";

/// Replaces each part that is a component, or becomes one, by a reference.
pub(super) fn refer(document: &mut OpenApi) {
    items(document);
    problems(document);
}

/// The items of each list: `List_Vm` has `Vm`s.
fn items(document: &mut OpenApi) {
    let Some(components) = &mut document.components else { return };
    let names: BTreeSet<String> = components.schemas.keys().cloned().collect();
    for (name, schema) in &mut components.schemas {
        let Some(item) = name.strip_prefix("List_").filter(|item| names.contains(*item)) else { continue };
        let RefOr::T(Schema::Object(list)) = schema else { continue };
        if let Some(RefOr::T(Schema::Array(array))) = list.properties.get_mut("items") {
            array.items = ArrayItems::RefOrSchema(Box::new(Ref::from_schema_name(item).into()));
        }
    }
}

/// Responses that are problems: few differ. Each is named after its status, and also after the first operation that has it
/// if another response has the status's name.
fn problems(document: &mut OpenApi) {
    let mut known: BTreeMap<String, Vec<(String, Response)>> = BTreeMap::new();
    for (operation, status, response) in answers(document) {
        let RefOr::T(found) = response else { continue };
        if !found.content.contains_key(PROBLEM) {
            continue;
        }
        let of_status = known.entry(status.to_owned()).or_default();
        let name = match of_status.iter().find(|(_, other)| other == found) {
            Some((name, _)) => name.clone(),
            None => {
                let first = of_status.is_empty();
                let name = format!("Problem_{status}")
                    + &if first { String::new() } else { format!("_{operation}") };
                of_status.push((name.clone(), found.clone()));
                name
            }
        };
        *response = RefOr::Ref(Ref::from_response_name(name));
    }
    let components = document.components.get_or_insert_default();
    components
        .responses
        .extend(known.into_values().flatten().map(|(name, response)| (name, RefOr::T(response))));
}

/// Every response of every operation, with the operation's id and the status.
fn answers(document: &mut OpenApi) -> impl Iterator<Item = (String, &str, &mut RefOr<Response>)> {
    document
        .paths
        .paths
        .values_mut()
        .flat_map(|path| [&mut path.get, &mut path.put, &mut path.post, &mut path.patch, &mut path.delete])
        .flatten()
        .flat_map(|operation: &mut Operation| {
            let id = operation.operation_id.clone().unwrap_or_default();
            let responses = operation.responses.responses.iter_mut();
            responses.map(move |(status, response)| (id.clone(), status.as_str(), response))
        })
}
