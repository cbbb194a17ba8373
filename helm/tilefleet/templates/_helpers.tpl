{{/* Name of the application, at most 63 characters. */}}
{{- define "tilefleet.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* Prefix of all object names; 50 characters leave room for suffixes. */}}
{{- define "tilefleet.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "tilefleet.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "tilefleet.operatorName" -}}
{{- printf "%s-operator" (include "tilefleet.fullname" .) -}}
{{- end -}}

{{/* Labels that never change: selectors use only these. */}}
{{- define "tilefleet.selectorLabels" -}}
app.kubernetes.io/name: {{ include "tilefleet.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end -}}

{{- define "tilefleet.labels" -}}
{{ include "tilefleet.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: tilefleet
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "tilefleet.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "tilefleet.operatorName" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Image reference of (dict "image" <values> "root" $): a digest wins over the tag. */}}
{{- define "tilefleet.image" -}}
{{- $path := .image.repository -}}
{{- if .image.registry -}}
{{- $path = printf "%s/%s" .image.registry .image.repository -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $path .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $path (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end -}}

{{/* Cluster-scoped: the namespace keeps two releases of one name apart. */}}
{{- define "tilefleet.balloonPriorityClass" -}}
{{- default (printf "%s-%s-balloon" .Release.Namespace (include "tilefleet.operatorName" . | trimSuffix "-operator") | trimPrefix "-") .Values.workers.balloon.priorityClassName -}}
{{- end -}}

{{/* What the operator does inside the namespaces that it watches. */}}
{{- define "tilefleet.namespacedRules" -}}
- apiGroups: [tilefleet.io]
  resources: [inferencedeployments]
  verbs: [get, list, watch]
- apiGroups: [tilefleet.io]
  resources: [inferencedeployments/status]
  verbs: [patch]
# Not a request of its own: where OwnerReferencesPermissionEnforcement is on, as on OpenShift, the
# API server asks for it when a child names its owner with blockOwnerDeletion.
- apiGroups: [tilefleet.io]
  resources: [inferencedeployments/finalizers]
  verbs: [update]
# A server-side apply that creates needs create beside patch.
- apiGroups: [""]
  resources: [pods]
  verbs: [list, watch, create, patch, delete]
- apiGroups: [""]
  resources: [services, serviceaccounts]
  verbs: [get, list, watch, create, patch]
- apiGroups: [apps]
  resources: [controllerrevisions]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
# Deleted where they are switched off.
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [monitoring.coreos.com]
  resources: [podmonitors]
  verbs: [get, list, create, patch, delete]
- apiGroups: [""]
  resources: [events]
  # list: what node autoscalers say of pods without a node.
  verbs: [create, list]
{{- end -}}

{{/* Not empty when (dict "enabled" auto|true|false "root" $) asks for an object of the Prometheus operator. */}}
{{- define "tilefleet.monitored" -}}
{{- $enabled := toString .enabled -}}
{{- if or (eq $enabled "true") (and (eq $enabled "auto") (.root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) -}}
true
{{- end -}}
{{- end -}}

{{/* The test's objects are not the operator's: its selectors must not find them. */}}
{{- define "tilefleet.testLabels" -}}
{{ include "tilefleet.labels" . | replace "component: operator" "component: test" }}
{{- end -}}

{{/* The objects the test pod needs come before it and go with it. */}}
{{- define "tilefleet.testHook" -}}
helm.sh/hook: test
helm.sh/hook-weight: "0"
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end -}}
